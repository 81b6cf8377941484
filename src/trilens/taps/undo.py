"""Undoing what was done to a model, also where Ctrl-C falls between any two steps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["run_undone", "undone"]


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


def run_undone(work: Callable[[], None], undo: Callable[[], None]) -> None:
    """Do some work and undo it, as `undone` does, when this call returns.

    Nobody can hold on to this block: where Ctrl-C falls before the first line of an ``__exit__``,
    a traceback that is shown keeps a `with` block open.

    Args:
        work: what changes something, the change included.
        undo: finds out by itself what has been done, and may be called twice.
    """
    finished = False
    try:
        try:
            work()
        finally:
            undo()
            finished = True
    finally:
        if not finished:
            undo()
