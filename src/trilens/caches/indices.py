"""Positions, heads, rows and counts that a caller gives: read, or refused with the range."""

from __future__ import annotations

from collections.abc import Iterable

from trilens.errors import OutOfRangeError, UsageError, ValueRangeError
from trilens.numbers import at_least, whole_number

__all__ = ["check_index", "check_positions", "check_unpad"]


def check_index(value: object, n: int, what: str, owner: str, *, negative: bool = False) -> int:
    """Read an index, counted from 0 (or, where negative is True, also from the end).

    Args:
        value: what the caller gave; anything but an integer is refused, bool too.
        n: how many there are.
        what: the noun of the error, such as "head".
        owner: whose range it is, such as "layer 3".
        negative: allow −n … −1.

    Returns:
        The index, from 0 to n − 1.

    Raises:
        OutOfRangeError: not an integer, or outside the range.
    """
    low = -n if negative else 0
    span = f"{owner} has {what}s {low}–{n - 1}".replace("-", "−")
    try:
        index = whole_number(value, what)
    except OutOfRangeError:
        raise OutOfRangeError(f"{what} {value!r} is not an integer: {span}") from None
    if not low <= index < n:
        raise OutOfRangeError(f"{what} {index} is out of range: {span}")
    return index + n if index < 0 else index


def check_positions(positions: object, n: int, what: str, owner: str) -> list[int]:
    """Read several positions, each −n … n − 1, as positions from 0.

    Raises:
        OutOfRangeError: one of them is not an integer or outside the range.
        UsageError: not a sequence of positions.
    """
    if isinstance(positions, str) or not isinstance(positions, Iterable):
        raise UsageError(f"positions {positions!r} are not a sequence: give a list such as [0, 5]")
    return [check_index(value, n, what, owner, negative=True) for value in positions]


def check_unpad(
    row: int, n: int, *, batch: int, seq_q: int, seq_k: int, query_offset: int = 0
) -> tuple[int, int]:
    """Read the batch row and the number of real tokens to cut out of a pattern.

    Raises:
        OutOfRangeError: no such row.
        ValueRangeError: n is not in 1 … seq_q.
        UsageError: queries and keys are not the same tokens.
    """
    if seq_q != seq_k or query_offset:
        raise UsageError(
            f"unpad needs queries and keys of the same tokens: this pattern has {seq_q} queries, "
            f"{seq_k} keys and query_offset {query_offset}"
        )
    if not 1 <= at_least(1, n, "n") <= seq_q:
        raise ValueRangeError(f"n {n!r} is out of range: this pattern has 1–{seq_q} tokens")
    return check_index(row, batch, "batch row", "this pattern"), int(n)
