"""What all commands share: errors as one line with an exit code, and where output goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import typer
from rich.console import Console

from trilens.errors import AnatomyError, CaptureError, DamageError, TrilensError, WriteError

__all__ = ["DebugOption", "FormatOption", "console", "one_line_errors"]

FormatOption = Annotated[
    Literal["table", "json"], typer.Option("--format", help="How to print the result.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_PIPE_WIDTH = 120


@contextmanager
def one_line_errors(
    debug: bool, *, failures: tuple[type[TrilensError], ...] = (), stopped: str = ""
) -> Iterator[None]:
    """One line on stderr and an exit code instead of a traceback.

    Codes: 1 the work failed, 2 an argument or file is wrong, 3 more damage than allowed,
    130 interrupted.

    Args:
        debug: let the traceback through.
        failures: further errors that mean failure, not misuse.
        stopped: what to say when the user interrupts.
    """
    try:
        yield
        # A full disk shows when the buffer is emptied: here, where it can still be said.
        sys.stdout.flush()
    except TrilensError as error:
        if debug:
            raise
        typer.echo(f"trilens: {' '.join(str(error).split())}", err=True)
        failed = isinstance(error, (AnatomyError, CaptureError, WriteError, *failures))
        refused = isinstance(error, DamageError)
        raise typer.Exit(3 if refused else 1 if failed else 2) from None
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        if debug:
            raise
        # What is left in the buffer can't be written either: don't try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"trilens: output failed: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if stopped:
            typer.echo(f"trilens: {stopped}", err=True)
        raise typer.Exit(130) from None


def console(pipe_width: int = _PIPE_WIDTH) -> Console:
    """Standard output. A pipe has no width: wide enough for one row per layer."""
    width = None if sys.stdout.isatty() else pipe_width
    return Console(width=width, highlight=False, markup=False)
