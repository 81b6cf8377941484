"""Requests to end: a terminal that closes and `kill` clean up as Ctrl-C does."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["Stopped", "stop_cleanly"]

_REQUESTS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        exit_code: What a shell reports of a process that this signal ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def stop_cleanly() -> None:
    """Raise `Stopped` in the main thread where SIGTERM or SIGHUP would end the process at once."""
    for number in _REQUESTS:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: so it stays
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in _REQUESTS:  # once is enough: what is cleaning up is not interrupted
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)
