"""Whole numbers that a caller gives: Python's, NumPy's, those in a tensor; never a bool."""

from __future__ import annotations

import operator

from trilens.errors import OutOfRangeError, ValueRangeError

__all__ = ["at_least", "whole_number"]


def whole_number(value: object, noun: str) -> int:
    """`value` as an int: Python, NumPy and zero-dimensional integer tensors are whole numbers.

    Raises:
        OutOfRangeError: the value is a bool or not a whole number.
    """
    # A tensor of one bool has an index too.
    if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
    raise OutOfRangeError(f"{noun} {value!r} is not a whole number: pass an int")


def at_least(low: int, value: object, noun: str) -> int:
    """`value` as an int from `low` on.

    Raises:
        ValueRangeError: not a whole number, or below.
    """
    try:
        number = whole_number(value, noun)
    except OutOfRangeError:
        number = low - 1
    if number < low:
        raise ValueRangeError(
            f"{noun} {value!r} is out of range: it is an integer of {low} or more"
        )
    return number
