"""A lock of captures that share a model or a config object; others run side by side."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CaptureLock"]


class CaptureLock:
    """One re-entrant lock per owner object; those of owners that are gone go with the next new one.

    No callback of a weak reference takes them away: Ctrl-C that falls into one is lost.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._locks: dict[int, tuple[weakref.ref[object], threading.RLock]] = {}
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked process: threads that hold a lock are not there to let it go."""
        self._guard = threading.RLock()
        self._locks.clear()

    def _lock_of(self, owner: object) -> threading.RLock:
        with self._guard:
            owner_of, lock = self._locks.get(id(owner), (None, None))
            if lock is None or owner_of is None or owner_of() is not owner:
                for key in [key for key, (gone, _) in self._locks.items() if gone() is None]:
                    self._locks.pop(key, None)
                lock = threading.RLock()
                self._locks[id(owner)] = weakref.ref(owner), lock
            return lock

    @contextmanager
    def take(self, owner: object) -> Iterator[None]:
        """Hold the owner's lock for the length of the block."""
        with self._lock_of(owner):
            yield
