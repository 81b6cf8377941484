"""Runs: one at a time, the others in line; each can be cancelled, and reports what it does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Any

from trilens.errors import BusyError, RunCancelledError, TimeLimitError, TrilensError
from trilens.printable import one_line
from trilens.progress import Step

__all__ = ["Event", "Run", "Runs", "failure"]

_EVERY_S = 0.05
_WAITING = 8

Event = dict[str, Any]
Work = Callable[["Run"], Event]


class Run:
    """One run: what it reports, and how it is ended.

    Attributes:
        events: what it reports, in order; None after the last.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.future: Future[None] | None = None
        self._loop = loop
        self._seconds = seconds
        self._deadline = float("inf")
        self._cancelled = threading.Event()
        self._told = 0.0

    def begin(self) -> None:
        """The time that it may take starts now."""
        self._deadline = monotonic() + self._seconds

    def cancel(self) -> None:
        """End it at its next step; may be called from any thread, and twice."""
        self._cancelled.set()

    def check(self) -> None:
        """Called by the work wherever it can end.

        Raises:
            RunCancelledError: it was cancelled.
            TimeLimitError: it took too long.
        """
        if self._cancelled.is_set():
            raise RunCancelledError("the run was cancelled")
        if monotonic() > self._deadline:
            raise TimeLimitError(
                f"the run took longer than {self._seconds:g} s: give a shorter prompt, fewer new "
                "tokens, or more time with --time-limit"
            )

    def step(self, step: Step) -> None:
        """Report progress; of many steps, some."""
        self.check()
        now = monotonic()
        if now - self._told >= _EVERY_S:
            self._told = now
            self.tell({"done": step.done, "total": step.total, "what": one_line(step.what, 120)})

    def tell(self, event: Event | None) -> None:
        """Report an event; from any thread."""
        self.soon(self.events.put_nowait, event)

    def soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Have something called in the event loop; a loop that has ended calls nothing."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)


class Runs:
    """One thread that works, and the runs in line for it.

    Args:
        seconds: that a run may take.
        waiting: the most runs in line, besides the one that works.
    """

    def __init__(self, *, seconds: float, waiting: int = _WAITING) -> None:
        self._seconds = seconds
        self._waiting = waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trilens-run")
        self._line: list[Run] = []

    def start(self, work: Work) -> Run:
        """Put a run in line; call it in the event loop.

        Args:
            work: runs on the thread that works; its result is the last event.

        Raises:
            BusyError: too many are in line.
        """
        if len(self._line) > self._waiting:
            raise BusyError(
                f"{self._waiting} runs wait already, which is the most: try again when one of "
                "them has ended"
            )
        run = Run(asyncio.get_running_loop(), self._seconds)
        self._line.append(run)
        if len(self._line) > 1:
            run.events.put_nowait({"waiting": len(self._line) - 1})
        run.future = self._pool.submit(_work, run, work)
        run.future.add_done_callback(lambda _: self._ended(run))
        return run

    def cancel(self, run: Run) -> None:
        """End a run; one that waits leaves the line at once."""
        run.cancel()
        if run.future is not None:
            run.future.cancel()

    def close(self) -> None:
        """Cancel all, and wait for the one that works to end."""
        for run in list(self._line):
            self.cancel(run)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ended(self, run: Run) -> None:
        # From the thread that worked, or from the one that cancelled.
        run.tell(None)
        run.soon(self._leave, run)

    def _leave(self, run: Run) -> None:
        self._line.remove(run)
        for place, each in enumerate(self._line[1:], 1):
            each.events.put_nowait({"waiting": place})


def _work(run: Run, work: Work) -> None:
    run.begin()
    try:
        run.check()
        run.tell(work(run))
    except TrilensError as error:
        run.tell(failure(error))
    except Exception as error:  # noqa: BLE001  whatever a run dies of, the server goes on
        run.tell(failure(error))


def failure(error: Exception) -> Event:
    """An error as an event: its name, and one line."""
    return {"error": type(error).__name__, "message": one_line(str(error)) or "no message"}
