"""How long work reports what it does: one callback, whatever the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Progress", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """Where long work stands.

    Attributes:
        done: Units of work that are finished.
        total: Units of work in all.
        what: What runs now, or has just been finished: a tensor, a block, a batch.
        seconds_left: An estimate; None where there is none.
    """

    done: int
    total: int
    what: str
    seconds_left: float | None = None


Progress: TypeAlias = Callable[[Step], None]
"""Called on the thread that works, before or after each step; what it raises ends the work."""
