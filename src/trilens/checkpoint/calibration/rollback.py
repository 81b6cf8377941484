"""A calibration beside the place of its output: kept where it was killed, gone where it failed."""

from __future__ import annotations

import shutil
from pathlib import Path

from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.calibration.run import run_calibration
from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.format.damage import Damage, check_damage
from trilens.checkpoint.format.manifest import Journal
from trilens.checkpoint.format.names import WORK_NAME
from trilens.checkpoint.job import Job
from trilens.errors import TrilensError, WriteError
from trilens.progress import Progress

__all__ = ["rollback"]


def rollback(
    out: Path,
    job: Job,
    calibration: Calibration,
    journal: Journal,
    *,
    progress: Progress | None,
) -> tuple[Store, Damage]:
    """Code every matrix on a text, and refuse too much damage.

    What the same call would fail at again leaves nothing behind. What a kill or a full disk
    stopped keeps its finished blocks.

    Args:
        out: the output's directory.
        job: the checkpoint, and the plan.
        calibration: the text.
        journal: of the output; removed by the caller.
        progress: as in `run_calibration`.

    Raises:
        DamageError: more than `calibration` allows.
        TrilensError: as `run_calibration`.
    """
    work = out / WORK_NAME
    try:
        store, damage = run_calibration(job, calibration, work, progress=progress)
        check_damage(damage, calibration.max_perplexity_ratio)
    except WriteError:
        raise
    except TrilensError:
        if journal.is_empty:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return store, damage
