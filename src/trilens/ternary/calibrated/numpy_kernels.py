"""The hot loops of the calibrated rules in NumPy, the reference for the compiled ones.

Shapes
    scales  [rows, groups, planes] float64, planes 1 or 2; negative with four levels alone
    groups  [width] int64, the group of each column
    trits   [rows, planes, width] int8, written to
    levels  3, or 4 where 2 is a level too; of one plane alone
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["code_columns", "nearest", "sweep"]

_Floats: TypeAlias = NDArray[np.float64]
_Groups: TypeAlias = NDArray[np.int64]
_Trits: TypeAlias = NDArray[np.int8]


def nearest(target: _Floats, scales: _Floats, levels: int = 3) -> tuple[_Trits, _Floats]:
    """The trits of the level nearest to each number, and the level.

    Shapes: target [rows], scales [rows, planes] → [rows, planes], [rows]
    """
    first = scales[:, 0]
    if scales.shape[1] == 1:
        if levels == 4:
            signed = np.where(first < 0, -target, target)
            one = _trit(signed, np.abs(first))
            one += (signed > 1.5 * np.abs(first)).astype(np.int8)
        else:
            one = _trit(target, first)
        return one[:, None], first * one
    second = scales[:, 1]
    best = np.full(len(target), np.inf)
    found = np.zeros((len(target), 2), dtype=np.int8)
    value = np.zeros(len(target))
    for t in (-1, 0, 1):
        u = _trit(target - first * t, second)
        level = first * t + second * u
        distance = np.abs(target - level)
        better = distance < best
        best = np.where(better, distance, best)
        value = np.where(better, level, value)
        found[better, 0], found[better, 1] = t, u[better]
    return found, value


def code_columns(
    work: _Floats,
    scales: _Floats,
    upper: _Floats,
    groups: _Groups,
    trits: _Trits,
    errors: _Floats,
    levels: int = 3,
) -> None:
    """Code columns one after the other; each passes its error on to those that follow.

    Shapes: work [rows, width], the targets, written to; upper [width, width];
        errors [rows, width], written: each column's error over the diagonal of `upper`

    Source: the inner loop of arXiv 2210.17323, algorithm 1.
    """
    width = work.shape[1]
    for j in range(width):
        found, value = nearest(work[:, j], scales[:, groups[j]], levels)
        trits[:, :, j] = found
        error = (work[:, j] - value) / upper[j, j]
        errors[:, j] = error
        work[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]


def sweep(
    trits: _Trits,
    scales: _Floats,
    groups: _Groups,
    slope: _Floats,
    hessian: _Floats,
    least: _Floats,
    levels: int = 3,
) -> tuple[int, float]:
    """Go over the columns once and give each weight the level that is best for it, others fixed.

    Shapes: slope [rows, cols], (Ŵ − W)·H, kept up to date; hessian [cols, cols];
        least [rows], what a change must gain at least

    Returns:
        How many weights changed, and by how much Σ (ŵ − w) H (ŵ − w)ᵀ fell.
    """
    changed, gained = 0, np.zeros(len(trits))
    for j in range(trits.shape[2]):
        curve = hessian[j, j]
        if curve <= 0:
            continue
        of_group = scales[:, groups[j]]
        old = of_group[:, 0] * trits[:, 0, j]
        if trits.shape[1] == 2:
            old = old + of_group[:, 1] * trits[:, 1, j]
        found, value = nearest(old - slope[:, j] / curve, of_group, levels)
        step = value - old
        gain = -step * (2.0 * slope[:, j] + curve * step)
        which = np.flatnonzero(gain > least)
        if which.size == 0:
            continue
        trits[which, :, j] = found[which]
        slope[which] += step[which, None] * hessian[j]
        changed += which.size
        gained[which] += gain[which]
    total = 0.0
    for row_gained in gained:  # row after row, as the compiled loop adds them
        total += float(row_gained)
    return changed, total


def _trit(values: _Floats, scale: _Floats) -> NDArray[Any]:
    found: NDArray[Any] = (values > 0.5 * scale).astype(np.int8)
    found -= (values < -0.5 * scale).astype(np.int8)
    return found
