"""The shard function of `ternarize`: from one weight file of the source to one of the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.coding import CodedBefore, code_tensor, entries
from trilens.checkpoint.format.manifest import Order
from trilens.checkpoint.format.names import WORK_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.shards import ShardWriter
from trilens.checkpoint.job import Job, read_job
from trilens.checkpoint.source import Checkpoint
from trilens.errors import UsageError
from trilens.io.guarded import Stamp, sha256_of
from trilens.version import __version__
from trilens.workers.dispatch import RunShard, WorkerSpec

__all__ = ["open_worker", "shard_runner", "worker_spec"]


def shard_runner(
    out: Path,
    job: Job,
    before: CodedBefore | None,
    observe: Callable[[str], None] | None = None,
) -> RunShard:
    """The shard function of an output.

    Args:
        out: the output's directory.
        job: the checkpoint, and what becomes of its tensors.
        before: what a calibration made of them.
        observe: called with the name of each tensor that was written.

    Returns:
        A function of a file's number, which reports the hash of what it wrote and each tensor.
    """

    def run(shard: int) -> dict[str, Any]:
        file = job.source.files[shard]
        todo, reports = job.of_file(file), []
        parts = [entry for pair in todo for entry in entries(*pair, job.plan)]
        with ShardWriter(out / file.name, parts) as writer:
            for pair in todo:
                found = code_tensor(*pair, job.plan, job.source, writer, before=before)
                reports.append(asdict(found))
                if observe is not None:
                    observe(found.name)
            job.source.check_unchanged()
            return {"sha256": writer.commit(), "tensors": reports}

    return run


def worker_spec(out: Path, job: Job, order: Order, *, calibrated: bool, threads: int) -> WorkerSpec:
    """What workers of another process or machine open.

    Args:
        out: the output's directory, which every worker must reach, as the source's.
        job: the checkpoint, and the plan.
        order: knows the source's content.
        calibrated: whether a calibration lies in the output.
        threads: of each worker.
    """
    files = {
        file.name: [order.source[file.name]["sha256"], *astuple(job.source.stamps[file])]
        for file in job.source.files
    }
    arguments = {
        "out": str(out.resolve()),
        "source": str(job.source.folder.resolve()),
        "files": files,
        "plan": job.plan.to_dict(),
        "calibrated": calibrated,
        "code": __version__,
    }
    return WorkerSpec(__name__, arguments, threads)


def open_worker(arguments: dict[str, Any]) -> RunShard:
    """The checkpoint, held open for the shards of one output.

    Raises:
        UsageError: the source has other content than the driver's, or trilens another version.
        LoadError: it cannot be read.
    """
    if arguments["code"] != __version__:
        raise UsageError(
            f"worker runs trilens {__version__}, and the driver {arguments['code']}: install the "
            "same version everywhere"
        )
    out = Path(arguments["out"])
    job = read_job(arguments["source"], TernaryPlan.from_dict(arguments["plan"]))
    run = shard_runner(out, job, Store(out / WORK_NAME) if arguments["calibrated"] else None)
    known = arguments["files"]

    def checked(shard: int) -> dict[str, Any]:
        _check_same(job.source, job.source.files[shard], *known[job.source.files[shard].name])
        return run(shard)

    return checked


def _check_same(source: Checkpoint, file: Path, sha256: str, *stamp: int) -> None:
    """Refuse another file than the driver's; where it is not the very same, its content counts."""
    if source.stamps[file] != Stamp(*stamp) and sha256_of(file) != sha256:
        raise UsageError(
            f"worker found other weights at {file} than the driver: give all workers the same files"
        )
