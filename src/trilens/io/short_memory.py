"""Which errors say that memory is full: of the machine, and no property of what was running."""

from __future__ import annotations

import errno

__all__ = ["is_short_of_memory"]

# torch has a class of its own for accelerators alone.
_SIGNS = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full, by its class or, of torch's, by its words.

    Who asks a model a question by trying takes any other error for its answer.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )
