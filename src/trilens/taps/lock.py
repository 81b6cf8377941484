"""A lock of captures that share a model or a config object; others run side by side."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CaptureLock"]


class CaptureLock:
    """One re-entrant lock per owner object, alive as long as the owner is."""

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._locks: dict[int, threading.RLock] = {}
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked process: threads that hold a lock are not there to let it go."""
        self._guard = threading.RLock()
        self._locks.clear()

    def _lock_of(self, owner: object) -> threading.RLock:
        with self._guard:
            key = id(owner)
            if key not in self._locks:
                self._locks[key] = threading.RLock()
                weakref.finalize(owner, self._locks.pop, key, None)
            return self._locks[key]

    @contextmanager
    def take(self, owner: object) -> Iterator[None]:
        """Hold the owner's lock for the length of the block."""
        with self._lock_of(owner):
            yield
