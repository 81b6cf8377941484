"""An interrupt that fell into a finalizer comes again, and not before the hook is left."""

from __future__ import annotations

import _thread
import time
import traceback
from types import SimpleNamespace
from typing import Any

import pytest

from trilens.cli import interrupts

LOST = SimpleNamespace(exc_value=KeyboardInterrupt())


def seen() -> list[str]:
    """The functions that a second interrupt is raised in."""
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupts._raise_again(print, LOST)
        for _ in range(2000):  # a sleep is not cut short by it
            time.sleep(0.005)
    return [frame.name for frame in traceback.extract_tb(caught.tb)]


def test_it_comes_again() -> None:
    assert "_raise_again" not in seen()


def test_a_hook_that_takes_its_time_is_left_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Any, given: Any) -> None:
        _thread.start_new_thread(function, given)
        time.sleep(20 * interrupts._SOON_S)

    busy = SimpleNamespace(start_new_thread=slow, interrupt_main=_thread.interrupt_main)
    monkeypatch.setattr(interrupts, "_thread", busy)
    assert "_raise_again" not in seen()


def test_anything_else_is_shown() -> None:
    shown: list[object] = []
    other = SimpleNamespace(exc_value=ValueError())
    interrupts._raise_again(shown.append, other)
    assert shown == [other]
