"""The three standard streams: lines on them, and what is done where one is closed or full."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from io import TextIOWrapper

import typer

from trilens.printable import escaped_text, one_line

__all__ = ["be_quiet", "is_quiet", "output_errors", "prepare_streams", "say", "say_piece"]

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def be_quiet(quiet: bool) -> None:
    """Whether the command that begins here shows results and errors alone."""
    _QUIET.set(quiet)


def is_quiet() -> bool:
    """Whether progress and times are left out."""
    return _QUIET.get()


def say(text: str, *, err: bool = False) -> None:
    """Print one line to standard output, or to standard error: there it is lost where it can't be.

    Raises:
        OSError: standard output can't be written to.
    """
    if not err:
        typer.echo(one_line(text))
        return
    with suppress(OSError):
        typer.echo(one_line(text), err=True)


def say_piece(text: str) -> None:
    """Print a piece of running text to standard output, its line breaks as they are."""
    typer.echo(escaped_text(text), nl=False)


def prepare_streams() -> None:
    """Open what the caller closed (``>&-``), and let no character of a text end the command.

    Python leaves None where a stream is closed, and its number to the next file that is opened:
    what a library prints would go into that file. What is opened here refuses to be read or
    written, as a closed stream does; errors are lost.

    Raises:
        OSError: the null device cannot be opened.
    """
    for name, mode, flags in (
        ("stdin", "r", os.O_WRONLY),
        ("stdout", "w", os.O_RDONLY),
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            # The lowest free number is taken: its own, unless another file has it by now.
            file = os.open(os.devnull, flags)
            setattr(sys, name, open(file, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def output_errors(*, debug: bool = False) -> Iterator[None]:
    """Turn an error of standard output into the end of the command: 0 for a reader that went away.

    Args:
        debug: print the traceback of any other.

    Raises:
        typer.Exit: with 0 after ``| head``, with 1 where nothing can be written.
    """
    try:
        yield
        # A full disk shows when the buffer is emptied: here, where it can still be said.
        sys.stdout.flush()
    except OSError as error:
        _discard()
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(0) from None
        if debug:
            with suppress(OSError):
                traceback.print_exc()
        say(f"trilens: output failed: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None


def _discard() -> None:
    """What is left in the buffer can't be written either: don't try again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
