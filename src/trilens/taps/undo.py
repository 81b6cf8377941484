"""Undoing what was done to a model, also where Ctrl-C falls between any two steps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["undone"]


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` when the block ends, and once more where an interrupt ended the first call.

    Enter it before anything is done: KeyboardInterrupt may fall between a change and the line that
    notes it.

    Args:
        undo: finds out by itself what has been done, and may be called twice.
    """
    finished = False
    try:
        try:
            yield
        finally:
            undo()
            finished = True
    finally:
        if not finished:
            undo()
