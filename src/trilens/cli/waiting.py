"""A line on the terminal while something takes its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from trilens.cli.streams import is_quiet
from trilens.printable import one_line

__all__ = ["status", "terminal"]


def terminal() -> Console | None:
    """Where progress is shown; None where standard error is no terminal, or with --quiet."""
    errors = Console(stderr=True)
    return errors if errors.is_terminal and not is_quiet() else None


@contextmanager
def status(what: str) -> Iterator[None]:
    """A line on the terminal while something takes its time; nothing elsewhere."""
    errors = terminal()
    if errors is None:
        yield
        return
    with errors.status(Text(one_line(what))):
        yield
