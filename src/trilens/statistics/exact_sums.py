"""Sums and averages in float64 that keep their rounding errors, so that order does not matter.

Source: the error-free sum is Knuth's, the exact product Dekker's and Veltkamp's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Vector", "column_sums", "divided", "two_sum"]

Vector = NDArray[np.float64]


def two_sum(a: Vector, b: Vector) -> tuple[Vector, Vector]:
    """a + b, rounded, and the rounding error of that sum, exactly."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def column_sums(rows: Vector) -> tuple[Vector, Vector]:
    """Sums over the first axis as pairs: the rounded sum, and what rounding left out of it.

    The order of batches then cannot move an average across a threshold, and a column that is
    constant averages to that very constant.

    Shapes:
        rows [steps, units], at least one step; returns [units] twice.
    """
    rest = np.zeros(rows.shape[1])
    while len(rows) > 1:
        half = len(rows) // 2
        odd = rows[2 * half :]
        rows, errors = two_sum(rows[:half], rows[half : 2 * half])
        rest = rest + errors.sum(axis=0)
        if len(odd):
            rows[0], error = two_sum(rows[0], odd[0])
            rest = rest + error
    return rows[0], rest


def divided(total: Vector, rest: Vector, count: int) -> Vector:
    """(total + rest) / count, off by little more than half an ulp.

    The quotient is mended by its own remainder. That is the exact quotient rounded to nearest,
    unless it lies within about 2⁻⁵² ulp of the middle between two numbers: then either of them.
    """
    quotient = total / count
    # quotient · count exactly, as high + low: NumPy has no fused multiply-add.
    high = quotient * count
    q_high, q_low = _halves(quotient)
    n_high, n_low = _halves(np.float64(count))
    low = ((q_high * n_high - high) + q_high * n_low + q_low * n_high) + q_low * n_low
    return np.asarray(quotient + (((total - high) - low) + rest) / count, dtype=np.float64)


def _halves(x: Any) -> tuple[Any, Any]:
    """A float64 as two of at most 26 bits each (Veltkamp)."""
    shifted = x * 134217729.0  # 2²⁷ + 1
    high = shifted - (shifted - x)
    return high, x - high
