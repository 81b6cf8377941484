"""Ctrl-C ends the command with code 130 and without a traceback, from the first import on.

Python raises KeyboardInterrupt wherever it is. While a command works, that undoes what has been
begun and is told in one line. Before and after, when modules are imported, options are read and
the interpreter shuts down, there is nothing to undo and nobody to catch it. While a command works,
`kill` and a terminal that closes undo as Ctrl-C does.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

__all__ = ["INTERRUPTED", "Stopped", "end_when_interrupted", "interruptible"]

INTERRUPTED = 130
"""The exit code of a command that SIGINT ended, as shells count it."""


_SOON_S = 0.005
_REQUESTS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP asked this process to end.

    Attributes:
        exit_code: What a shell reports of a process that this signal ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _end(_number: int, _frame: object) -> None:
    os._exit(INTERRUPTED)


def end_when_interrupted() -> None:
    """Let Ctrl-C end this process at once, if it is the command; elsewhere nothing is changed."""
    if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block, SIGTERM and SIGHUP `Stopped`."""
    with _stoppable(), _interruptible():
        yield


@contextmanager
def _stoppable() -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    # nohup ignores SIGHUP: so it stays.
    mine = [n for n in _REQUESTS if is_main and signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, _stop)
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _frame: object) -> None:
    for each in _REQUESTS:  # once is enough: what is cleaning up is not interrupted
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


@contextmanager
def _interruptible() -> Iterator[None]:
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
        # Not from here: it would be raised inside this hook, and be lost again. And no thread of
        # `threading`, whose start waits: on a busy machine for longer than the thread does.
        _thread.start_new_thread(_interrupt_outside, (threading.main_thread().ident or 0,))
    else:
        shown(lost)


def _interrupt_outside(main: int) -> None:
    """Interrupt the main thread once it has left the hook."""
    time.sleep(_SOON_S)
    while _is_in_hook(sys._current_frames().get(main)):
        time.sleep(_SOON_S)
    _thread.interrupt_main()


def _is_in_hook(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not _raise_again.__code__:
        frame = frame.f_back
    return frame is not None


def _is_the_command() -> bool:
    command = getattr(sys, "argv", None) or [""]
    return command[0].rpartition("/")[2] == "trilens" or (
        command[0] == "-m" and "-m trilens" in " ".join(sys.orig_argv)
    )
