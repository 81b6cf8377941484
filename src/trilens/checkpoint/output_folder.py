"""Where an output may go, and what a refused run leaves there: nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trilens.checkpoint.format.manifest import Journal
from trilens.checkpoint.format.names import JOURNAL_NAME, MANIFEST_NAME, WORK_NAME
from trilens.errors import (
    DamageError,
    NonFiniteError,
    TrilensError,
    UsageError,
    ValueRangeError,
    WriteError,
)
from trilens.io.messages import reason

__all__ = ["check_folder", "clean_refusal"]


def check_folder(out: Path, source: Path) -> None:
    """Refuse a directory that holds something else than an output, finished or not.

    Raises:
        UsageError: it is the source, or not empty.
        WriteError: it cannot be read.
    """
    try:
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        same = out.resolve() == source.resolve()
    except OSError as cause:
        raise WriteError(f"directory {out} cannot be written: {reason(cause)}") from cause
    if same:
        raise UsageError(f"{out} is the source itself: give another directory")
    # Those of earlier versions had no digits.
    left_over = {name for name in names if name.startswith(".") and name.endswith(".partial")}
    if names - left_over and not names & {MANIFEST_NAME, JOURNAL_NAME}:
        raise UsageError(f"directory {out} is not empty: give a new one")


@contextmanager
def clean_refusal(out: Path, journal: Journal) -> Iterator[None]:
    """Leave nothing of a run that would be refused again; keep what a full disk stopped."""
    try:
        yield
    except WriteError:
        raise
    except (NonFiniteError, ValueRangeError, DamageError):
        shutil.rmtree(out / WORK_NAME, ignore_errors=True)
        journal.remove_all()
        raise
    except TrilensError:
        if journal.is_empty and not (out / WORK_NAME).exists():
            journal.remove()
        raise
