"""The hot loops of the calibrated rules, as plain functions that numba compiles.

`numpy_kernels` documents what each one computes, and gives the same bits. No `fastmath`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["code_columns", "sweep"]


def code_columns(
    work: Any, scales: Any, upper: Any, groups: Any, trits: Any, errors: Any, levels: int
) -> None:
    """See `numpy_kernels.code_columns`."""
    rows, width = work.shape
    two = scales.shape[2] == 2
    for r in range(rows):
        for j in range(width):
            target = work[r, j]
            first = scales[r, groups[j], 0]
            best, one, other = np.inf, 0, 0
            if two:
                second = scales[r, groups[j], 1]
                value = 0.0
                for t in range(-1, 2):
                    rest = target - first * t
                    u = int(rest > 0.5 * second) - int(rest < -0.5 * second)
                    level = first * t + second * u
                    if abs(target - level) < best:
                        best, one, other, value = abs(target - level), t, u, level
                trits[r, 1, j] = other
            else:
                width_of = abs(first) if levels == 4 else first
                signed = -target if first < 0.0 and levels == 4 else target
                one = int(signed > 0.5 * width_of) - int(signed < -0.5 * width_of)
                if levels == 4:
                    one += int(signed > 1.5 * width_of)
                value = first * one
            trits[r, 0, j] = one
            error = (target - value) / upper[j, j]
            errors[r, j] = error
            for k in range(j + 1, width):
                work[r, k] -= error * upper[j, k]


def sweep(
    trits: Any, scales: Any, groups: Any, slope: Any, hessian: Any, least: Any, levels: int
) -> Any:
    """See `numpy_kernels.sweep`."""
    rows, planes, cols = trits.shape
    changed, gained = 0, 0.0
    for r in range(rows):
        row_gained = 0.0
        for j in range(cols):
            curve = hessian[j, j]
            if curve <= 0.0:
                continue
            first = scales[r, groups[j], 0]
            best, one, other = np.inf, 0, 0
            if planes == 2:
                second = scales[r, groups[j], 1]
                old = first * trits[r, 0, j] + second * trits[r, 1, j]
                target = old - slope[r, j] / curve
                value = 0.0
                for t in range(-1, 2):
                    rest = target - first * t
                    u = int(rest > 0.5 * second) - int(rest < -0.5 * second)
                    level = first * t + second * u
                    if abs(target - level) < best:
                        best, one, other, value = abs(target - level), t, u, level
            else:
                old = first * trits[r, 0, j]
                target = old - slope[r, j] / curve
                width_of = abs(first) if levels == 4 else first
                signed = -target if first < 0.0 and levels == 4 else target
                one = int(signed > 0.5 * width_of) - int(signed < -0.5 * width_of)
                if levels == 4:
                    one += int(signed > 1.5 * width_of)
                value = first * one
            step = value - old
            gain = -step * (2.0 * slope[r, j] + curve * step)
            if gain <= least[r]:
                continue
            trits[r, 0, j] = one
            if planes == 2:
                trits[r, 1, j] = other
            for k in range(cols):
                slope[r, k] += step * hessian[j, k]
            changed += 1
            row_gained += gain
        gained += row_gained
    return changed, gained
