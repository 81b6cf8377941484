"""Where an output may go."""

from __future__ import annotations

from pathlib import Path

from trilens.checkpoint.format.names import JOURNAL_NAME, MANIFEST_NAME
from trilens.errors import UsageError, WriteError
from trilens.io.atomic import sweep
from trilens.io.messages import reason

__all__ = ["check_folder", "make_folder"]


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
    left_over = {name for name in names if name.startswith(".") and name.endswith(".partial")}
    if names - left_over and not names & {MANIFEST_NAME, JOURNAL_NAME}:
        raise UsageError(f"directory {out} is not empty: give a new one")


def make_folder(out: Path) -> None:
    """Make the directory where it is missing, and remove what a killed run left in it.

    Raises:
        WriteError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
    except OSError as cause:
        raise WriteError(f"directory {out} cannot be written: {reason(cause)}") from cause
