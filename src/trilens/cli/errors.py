"""Errors as one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from trilens.cli.interrupts import INTERRUPTED, Stopped
from trilens.cli.streams import output_errors, say
from trilens.errors import (
    AnatomyError,
    CaptureError,
    DamageError,
    NonFiniteError,
    TrilensError,
    TrilensWarning,
    WriteError,
)
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory

__all__ = ["FILE_FAILURES", "MODEL_FAILURES", "OneLineGroup", "one_line_errors"]

# Of commands that read files alone: a number in them that is not finite is wrong input.
FILE_FAILURES: tuple[type[TrilensError], ...] = (AnatomyError, CaptureError, WriteError)
# Of those that run a model: it gave that number.
MODEL_FAILURES = (*FILE_FAILURES, NonFiniteError)


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
            with output_errors():
                code = super().main(
                    given or ["--help"],
                    prog_name or "trilens",
                    complete_var,
                    False,
                    windows_expand_args,
                    **extra,
                )
        except typer.Abort:
            code = INTERRUPTED
        except typer.Exit as ended:
            code = ended.exit_code
        except SystemExit as ended:
            # The parser's own answer where the reader of the help went away.
            code = 0 if isinstance(ended.__context__, BrokenPipeError) else ended.code
        except Exception as error:
            # What the parser raises; its classes are typer's own, or click's in older versions.
            if not hasattr(error, "format_message"):
                raise
            words = " ".join(error.format_message().split())
            say(f"trilens: {words} ({_help_command(error)} lists the options)", err=True)
            code = 2
        sys.exit(code or 0)


def _help_command(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'trilens'} --help"


@contextmanager
def one_line_errors(
    debug: bool, *, failures: tuple[type[TrilensError], ...] = MODEL_FAILURES, stopped: str = ""
) -> Iterator[None]:
    """One line on stderr and an exit code instead of a traceback.

    Codes: 1 the work failed, 2 an argument or file is wrong, 3 more damage than allowed,
    130 interrupted, 143 and 129 after SIGTERM and SIGHUP.

    Args:
        debug: let the traceback through.
        failures: errors that mean failure, not misuse.
        stopped: what to say when the user interrupts.
    """
    try:
        with output_errors(debug=debug), _warnings_in_one_line():
            yield
    except TrilensError as error:
        if debug:
            raise
        say(f"trilens: {error}", err=True)
        failed = isinstance(error, failures)
        refused = isinstance(error, DamageError)
        raise typer.Exit(3 if refused else 1 if failed else 2) from None
    except Exception as error:
        if debug or not is_short_of_memory(error):
            raise
        say(
            f"trilens: memory ran out: {reason(error)}; free some, or ask for less at once",
            err=True,
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        if stopped:
            say(f"trilens: {stopped}", err=True)
        raise typer.Exit(stop.exit_code if isinstance(stop, Stopped) else INTERRUPTED) from None


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Our own warnings as lines of their own; those of other libraries stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TrilensWarning)
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, TrilensWarning):
                say(f"trilens: note: {message}", err=True)
            else:
                shown(message, category, *place, **more)

        warnings.showwarning = show
        yield
