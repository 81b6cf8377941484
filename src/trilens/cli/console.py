"""Where output goes: results to standard output or a file, progress and times to standard error.

Lines of text leave through `streams.say` and `report.text`, JSON through `show_json`, progress
through `shown_progress` and `status`: each without the control codes that a name may hold.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from trilens.cli.pages import check_page, is_page, write_page
from trilens.cli.streams import is_quiet, say
from trilens.cli.waiting import status, terminal
from trilens.errors import UsageError
from trilens.io.atomic import write_bytes
from trilens.io.json import json_text
from trilens.printable import escaped_json, one_line
from trilens.progress import Progress, Step
from trilens.results import Tabular

__all__ = ["check_file", "show", "show_json", "show_result", "shown_progress", "status", "timed"]

_PIPE_WIDTH = 120


T = TypeVar("T", bound=Tabular)


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(
    draw: Callable[[Console], None], *, file: Path | None = None, pipe_width: int = _PIPE_WIDTH
) -> None:
    """Draw tables on standard output, or as text into a file.

    A pipe and a file have no width: COLUMNS, else `pipe_width`, enough for one row per layer.
    """
    tty = file is None and sys.stdout.isatty()
    width = None if tty or "COLUMNS" in os.environ else pipe_width
    text = None if file is None else StringIO()
    draw(_Output(width=width, highlight=False, markup=False, file=text))
    if file is not None and text is not None:
        _write(file, text.getvalue())


def show_json(values: Any, *, file: Path | None = None) -> None:
    """Print values as JSON, or write them to a file."""
    text = escaped_json(json_text(values))
    if file is None:
        typer.echo(text)
    else:
        _write(file, f"{text}\n")


def show_result(
    result: T,
    draw: Callable[[T, Console], None],
    *,
    format: str,
    head: Mapping[str, Any] = MappingProxyType({}),
    file: Path | None = None,
    pipe_width: int = _PIPE_WIDTH,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Show a result as --format asks: as JSON, `head` first, or drawn as tables.

    A file whose name ends in .html becomes a page; its header has the `facts`.
    """
    if file is not None and is_page(file):
        write_page(file, result, facts)
    elif format == "json":
        show_json({**head, **result.to_dict()}, file=file)
    else:
        show(lambda console: draw(result, console), file=file, pipe_width=pipe_width)


def check_file(file: Path | None, format: str = "table") -> None:
    """Refuse, before any work, an output that can't become a file.

    Raises:
        UsageError: a folder, a device or a pipe is there, or the folder does not exist; or it is a
            page, and the format JSON.
    """
    if file is None:
        return
    check_page(file, format)
    if file.is_dir():
        raise UsageError(f"output {file} is a directory: name a file")
    if file.exists() and not file.is_file():
        raise UsageError(f"output {file} is no regular file: name another place")
    if not file.parent.is_dir():
        raise UsageError(f"folder {file.parent} does not exist: make it first")


def _write(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


@contextmanager
def timed(output: Path | None) -> Iterator[None]:
    """Say at the end what was written, how large it is and how long it took."""
    started = perf_counter()
    yield
    if output is not None and output.exists() and not is_quiet():
        files = [output] if output.is_file() else [f for f in output.rglob("*") if f.is_file()]
        size = _size(sum(file.stat().st_size for file in files))
        say(f"wrote {output}: {size} in {perf_counter() - started:.1f} s", err=True)


def _size(n_bytes: int) -> str:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next((f"{n_bytes / k:.1f} {name}" for k, name in units if n_bytes >= k), f"{n_bytes} B")


@contextmanager
def shown_progress() -> Iterator[Progress | None]:
    """A bar on the terminal with the time left; None where none is shown."""
    errors = terminal()
    if errors is None:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")
        started = perf_counter()

        def report(step: Step) -> None:
            left = step.seconds_left
            if left is None and step.done:
                left = (perf_counter() - started) * (step.total - step.done) / step.done
            shown = "" if left is None else f"{left:.0f} s left"
            # The end of a long name says more than its beginning.
            what = one_line(step.what)
            what = what if len(what) <= 50 else f"…{what[-49:]}"
            bar.update(task, completed=step.done, total=step.total, description=what, left=shown)

        yield report
