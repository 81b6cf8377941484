"""Workers as Ray actors that stay open, on every node of a cluster.

Nodes write to the output's folder, which all must share; only what a shard reports comes back.
Actors are not restarted by Ray: a shard whose actor or node is lost goes to another actor, and
where the driver is lost, the output's own files say what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from trilens.errors import TrilensError, UsageError
from trilens.io.messages import reason
from trilens.workers.dispatch import Done, Failure, WorkerSpec
from trilens.workers.worker import ShardWorker

__all__ = ["RayWorkers"]

_POLL_S = 1.0


class RayWorkers:
    """Actors of a Ray cluster.

    Args:
        spec: what each opens.
        address: of the cluster, "auto" for the one of this machine, "local" for a new one. A
            session that is open already is used as it is.
        count: of actors; None for as many as the cluster has room for.
        gpus: of each actor.

    Raises:
        UsageError: Ray is not installed, there is no such cluster, or no room for one actor.
    """

    def __init__(
        self, spec: WorkerSpec, *, address: str, count: int | None, gpus: float = 0.0
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as cause:
            raise UsageError(
                "Ray is not installed: pip install 'trilens[ray]', or use workers of this machine"
            ) from cause
        self._ray: Any = ray
        self._opened = not ray.is_initialized()
        if self._opened:
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except Exception as cause:
                raise UsageError(
                    f"no Ray cluster at {address!r}: {reason(cause)}; give auto (one that runs "
                    "here), local (one is started for this run) or HOST:PORT of its head"
                ) from cause
        self._spec, self._most, self._gpus = spec, count, gpus
        self._actor: Any = ray.remote(ShardWorker).options(num_cpus=spec.threads, num_gpus=gpus)
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}
        if self._room() < 1:
            self.close()
            raise UsageError(
                f"the Ray cluster has no room for a worker of {spec.threads} CPUs and {gpus:g} "
                "GPUs: ask less of each, or add nodes"
            )

    def _room(self) -> int:
        """How many actors the nodes that are alive have room for."""
        found = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                have = node["Resources"]
                room = have.get("CPU", 0) // self._spec.threads
                if self._gpus:
                    room = min(room, have.get("GPU", 0) // self._gpus)
                found += int(room)
        return found if self._most is None else min(found, self._most)

    @property
    def is_free(self) -> bool:
        """Whether another shard can be given now."""
        return bool(self._idle) or len(self._busy) < max(1, self._room())

    def give(self, shard: int) -> None:
        """Let an idle actor, or a new one, begin a shard."""
        actor: Any = self._idle.pop() if self._idle else self._actor.remote(self._spec)
        self._busy[actor.run.remote(shard)] = (actor, shard)

    def wait(self) -> Sequence[Done | Failure]:
        """What has ended; waits for at least one.

        Actors that are idle now have nothing left to do. They are ended: one that a lost node
        still had room for when it was asked for waits for theirs.
        """
        self._end_idle()
        found: list[Done | Failure] = []
        while not found and self._busy:
            ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=_POLL_S)
            for reference in ready:
                actor, shard = self._busy.pop(reference)
                found.append(self._outcome(reference, actor, shard))
        return found

    def _outcome(self, reference: Any, actor: Any, shard: int) -> Done | Failure:
        try:
            report: dict[str, Any] = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            self._kill(actor)
            if isinstance(cause, TrilensError):
                return Failure(shard, str(cause), lost=False, error=cause)
            return Failure(shard, reason(cause), lost=True)
        except self._ray.exceptions.RayError as error:
            self._kill(actor)
            return Failure(shard, _first_line(error), lost=True)
        self._idle.append(actor)
        return Done(shard, report)

    def _kill(self, actor: Any) -> None:
        with suppress(Exception):
            self._ray.kill(actor, no_restart=True)

    def _end_idle(self) -> None:
        while self._idle:
            self._kill(self._idle.pop())

    def close(self) -> None:
        """End all actors, and the session where it was opened here."""
        self._end_idle()
        for actor, _ in self._busy.values():
            self._kill(actor)
        self._busy = {}
        if self._opened:
            self._ray.shutdown()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
