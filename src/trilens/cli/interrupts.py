"""Ctrl-C ends the command with code 130 and without a traceback, from the first import on.

Python raises KeyboardInterrupt wherever it is. While a command works, that undoes what has been
begun and is told in one line. Before and after, when modules are imported, options are read and
the interpreter shuts down, there is nothing to undo and nobody to catch it.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = ["INTERRUPTED", "end_when_interrupted", "interruptible"]

INTERRUPTED = 130
"""The exit code of a command that SIGINT ended, as shells count it."""


def _end(_number: int, _frame: object) -> None:
    os._exit(INTERRUPTED)


def end_when_interrupted() -> None:
    """Let Ctrl-C end this process at once, if it is the command; elsewhere nothing is changed."""
    if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    shown = sys.unraisablehook
    try:
        sys.unraisablehook = partial(_raise_again, shown)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, _end)
        sys.unraisablehook = shown


def _raise_again(shown: Callable[[Any], None], lost: Any) -> None:
    """Raise an interrupt again that fell into a finalizer, where Python would only print it."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        _thread.interrupt_main()
    else:
        shown(lost)


def _is_the_command() -> bool:
    command = getattr(sys, "argv", None) or [""]
    return command[0].rpartition("/")[2] == "trilens" or (
        command[0] == "-m" and "-m trilens" in " ".join(sys.orig_argv)
    )
