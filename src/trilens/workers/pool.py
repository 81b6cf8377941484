"""Which kind of workers a run has: local processes, or actors of a Ray cluster."""

from __future__ import annotations

from trilens.workers.dispatch import Workers, WorkerSpec
from trilens.workers.processes import LocalWorkers
from trilens.workers.ray import RayWorkers

__all__ = ["open_pool"]


def open_pool(spec: WorkerSpec, count: int, *, ray: str | None, gpus: float = 0.0) -> Workers:
    """Workers that open `spec`.

    Args:
        spec: what each opens.
        count: of local processes.
        ray: address of a cluster, whose nodes work instead, as many as there is room for.
        gpus: of each Ray worker.

    Raises:
        UsageError: Ray is not installed, there is no such cluster, or no room for one actor.
    """
    if ray is None:
        return LocalWorkers(spec, count)
    return RayWorkers(spec, address=ray, count=None, gpus=gpus)
