"""Errors as one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from trilens.errors import AnatomyError, CaptureError, DamageError, TrilensError, WriteError

__all__ = ["OneLineGroup", "one_line_errors"]


class OneLineGroup(TyperGroup):
    """The commands; a wrong option is one line too, and no arguments print the help."""

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(
                given or ["--help"],
                prog_name or "trilens",
                complete_var,
                False,
                windows_expand_args,
                **extra,
            )
        except typer.Abort:
            code = 130
        except Exception as error:
            # What the parser raises; its classes are typer's own, or click's in older versions.
            if not hasattr(error, "format_message"):
                raise
            _say(f"{error.format_message()} ({_help_command(error)} lists the options)")
            code = 2
        sys.exit(code or 0)


def _help_command(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'trilens'} --help"


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
        with _warnings_in_one_line():
            yield
        # A full disk shows when the buffer is emptied: here, where it can still be said.
        sys.stdout.flush()
    except TrilensError as error:
        if debug:
            raise
        _say(str(error))
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
        _say(f"output failed: {error.strerror or error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if stopped:
            _say(stopped)
        raise typer.Exit(130) from None


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Our own warnings as lines of their own; those of other libraries stay as they are."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if category.__module__.partition(".")[0] == "trilens":
                _say(f"note: {message}")
            else:
                shown(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _say(message: str) -> None:
    typer.echo(f"trilens: {' '.join(message.split())}", err=True)
