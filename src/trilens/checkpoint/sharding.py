"""The weight files of an output: each coded by itself, in this process or by several workers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.format.manifest import Journal, Order
from trilens.checkpoint.format.report import TensorReport
from trilens.checkpoint.job import Job
from trilens.checkpoint.shard_worker import shard_runner, worker_spec
from trilens.errors import ShardError, TrilensError, WriteError
from trilens.io.temporary import is_leftover, sweep
from trilens.progress import Progress, Step
from trilens.ternary.histogram import LevelHistogram
from trilens.workers.dispatch import InProcess, Workers, run_shards
from trilens.workers.pool import open_pool

__all__ = ["Who", "write_shards"]

_ENDING_S = 5.0


@dataclass(frozen=True, slots=True)
class Who:
    """Who codes the shards.

    Attributes:
        workers: Processes of this machine; 1 is this process.
        ray: Address of a Ray cluster, whose nodes work instead.
    """

    workers: int = 1
    ray: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether this process does it all."""
        return self.workers == 1 and self.ray is None


def write_shards(
    out: Path,
    job: Job,
    order: Order,
    journal: Journal,
    before: Store | None,
    *,
    who: Who,
    progress: Progress | None,
) -> tuple[list[TensorReport], dict[str, str]]:
    """Write every weight file that is not whole yet, the same bytes whoever does it.

    Returns:
        The report of each tensor, and the hash of each file.

    Raises:
        ShardError: a worker was lost with one shard several times; names it and the cause.
        TrilensError: as `code_tensor`.
    """
    files = job.source.files
    finished = {
        n: found for n, file in enumerate(files) if (found := journal.finished(out / file.name))
    }
    missing = [n for n in range(len(files)) if n not in finished]
    counter = _Counter(job, sum(len(reports) for _, reports in finished.values()), progress)
    pool: Workers = InProcess(shard_runner(out, job, before, counter.tensor))
    if not who.is_here and missing:
        count = min(who.workers, len(missing))
        threads = max(1, torch.get_num_threads() // count) if who.ray is None else 1
        spec = worker_spec(out, job, order, calibrated=before is not None, threads=threads)
        pool = open_pool(spec, count, ray=who.ray)
    try:
        for done in run_shards(
            pool, missing, done="ternarized", name=lambda n: f"shard {files[n].name}"
        ):
            name, digest = files[done.shard].name, done.report["sha256"]
            reports = [_reported(tensor) for tensor in done.report["tensors"]]
            _check_there(out / name)
            journal.add(name, digest, reports)
            finished[done.shard] = digest, reports
            if not who.is_here:
                counter.shard(name, len(reports))
    except ShardError as error:
        if isinstance(error.__cause__, TrilensError):
            raise error.__cause__ from None  # as this process would have raised it
        raise
    finally:
        if not who.is_here:
            _remove_unfinished(out, [files[n].name for n in missing if n not in finished])
    in_order = [finished[n] for n in range(len(files))]
    tensors = [report for _, reports in in_order for report in reports]
    return tensors, {file.name: digest for file, (digest, _) in zip(files, in_order, strict=True)}


def _reported(values: dict[str, Any]) -> TensorReport:
    """A tensor's report, with the histogram that files leave out."""
    report, held = TensorReport.from_dict(values), values["histogram"]
    return report if held is None else replace(report, histogram=LevelHistogram.from_dict(held))


class _Counter:
    """Reports tensors as they are written, and time left where workers write whole shards."""

    def __init__(self, job: Job, done: int, progress: Progress | None) -> None:
        self._total, self._progress = len(job.choices), progress
        self._before = self._done = done
        self._began = time.perf_counter()

    def tensor(self, name: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(Step(self._done, self._total, name))

    def shard(self, name: str, tensors: int) -> None:
        self._done += tensors
        if self._progress is not None:
            spent = time.perf_counter() - self._began
            left = spent * (self._total - self._done) / max(1, self._done - self._before)
            self._progress(Step(self._done, self._total, name, left))


def _check_there(shard: Path) -> None:
    if not shard.is_file():
        raise WriteError(
            f"{shard} was written by a worker and is not here: all nodes must share the output's "
            "folder"
        )


def _remove_unfinished(out: Path, names: list[str]) -> None:
    """What workers that were ended left: their temporary files, and shards that nobody noted."""
    if not names:
        return
    until = time.monotonic() + _ENDING_S
    sweep(out)
    while any(is_leftover(path.name) for path in out.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)  # a worker of another machine holds its file until it has ended
        sweep(out)
    for name in names:
        (out / name).unlink(missing_ok=True)
