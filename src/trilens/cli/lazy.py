"""The way from a command's declaration to its work, which imports the library."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from trilens.cli.errors import MODEL_FAILURES, one_line_errors
from trilens.cli.interrupts import interruptible
from trilens.errors import TrilensError
from trilens.io.paths import as_path

__all__ = ["run"]


def run(
    command: str,
    options: Mapping[str, Any],
    *,
    failures: tuple[type[TrilensError], ...] = MODEL_FAILURES,
    stopped: str = "",
) -> None:
    """Import `trilens.cli.run.<command>` and call its `run` with the command's options.

    Args:
        command: the module's name.
        options: `locals()` of the declaration: the options by name; `debug` stays here.
        failures: as in `one_line_errors`.
        stopped: likewise.
    """
    given = dict(options)
    with one_line_errors(given.pop("debug"), failures=failures, stopped=stopped):
        work = import_module(f"trilens.cli.run.{command}").run
        # The system's own refusal of a path, in the middle of the work, would pass for one of the
        # output.
        for name, value in given.items():
            if isinstance(value, Path):
                as_path(value, f"--{name}")
        with interruptible():
            work(**given)
