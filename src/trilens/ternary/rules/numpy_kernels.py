"""The hot loops in plain NumPy: what the compiled ones must equal, bit for bit.

Sums have a fixed order, so that the two agree exactly and results do not depend on the number of
threads. `cells` and `histogram` add weight after weight. `abs_sums` adds every 64th weight to one
of 64 lanes, for two halves of the unit apart; then come the weights that the halves left over, and
the lanes are folded in halves.

Shapes
    x       [units, length] float32 or float64; in `abs_sums`, `codes`, `coded_sums` and `two_bit`
            also uint16, the bits of bfloat16
    cuts    [units, n_cuts] of x's dtype, ascending, n_cuts even. A weight's cell is the number of
            cuts at or below it in the lower half plus those strictly below it in the upper half:
            a weight on a cut belongs to the side of the middle cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.weights_view import FloatArray, as_floats

__all__ = [
    "LANES",
    "abs_sums",
    "best_prefix",
    "best_quad",
    "bins",
    "cells",
    "coded_sums",
    "codes",
    "fold",
    "histogram",
    "sorted_cells",
    "squared_sums",
    "two_bit",
    "unfolds",
]

LANES = 64


def abs_sums(x: NDArray[Any]) -> NDArray[np.float64]:
    """Σ|w| of each unit."""
    n_units, length = x.shape
    magnitudes = np.abs(as_floats(x))
    half = length // (2 * LANES) * LANES
    # PROMOTE: Σ|w| over 2e8 weights drifts in float32 (0.277 of the truth, added one by one)
    halves = np.add.reduce(
        magnitudes[:, : 2 * half].reshape(n_units, 2, -1, LANES), axis=2, dtype=np.float64
    )
    lanes: NDArray[np.float64] = halves[:, 0] + halves[:, 1]
    for start in range(2 * half, length, LANES):
        step = magnitudes[:, start : start + LANES]
        lanes[:, : step.shape[1]] += step
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    totals: NDArray[np.float64] = lanes[:, 0]
    return totals


def codes(x: NDArray[Any], cuts: FloatArray, out: NDArray[np.int8]) -> None:
    """The cell of each weight, counted from the middle one: −1, 0, +1 for two cuts.

    Shapes: out [units, length]
    """
    x = as_floats(x)
    half = cuts.shape[1] // 2
    out[:] = -half
    for j in range(half):
        out += x >= cuts[:, j : j + 1]
    for j in range(half, 2 * half):
        out += x > cuts[:, j : j + 1]


def cells(x: FloatArray, cuts: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many weights are in each cell and their sum, `[units, n_cuts + 1]` each."""
    n_units, width = x.shape[0], cuts.shape[1] + 1
    cell = np.empty(x.shape, dtype=np.int8)
    codes(x, cuts, cell)
    index = cell.astype(np.int64)
    index += np.arange(n_units)[:, None] * width + width // 2
    flat = index.reshape(-1)
    counts, sums = _count(flat, x.reshape(-1), n_units * width)
    return counts.reshape(n_units, width), sums.reshape(n_units, width)


def histogram(
    x: FloatArray, base: int, shift: int, n_bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many |w| fall in each bin and their sum, `[n_bins]` each.

    A bin is a range of float32 bit patterns, which are ordered as the magnitudes are: bin
    (bits(|w|) >> shift) − base, and everything outside goes to the first or last bin.

    Shapes: x [length]
    """
    return _count(bins(x, base, shift, n_bins), np.abs(x), n_bins)


def bins(x: FloatArray, base: int, shift: int, n_bins: int) -> NDArray[np.int64]:
    """The bin of each weight, as `histogram` counts them."""
    with np.errstate(over="ignore", under="ignore"):  # float64 beyond float32 keeps its order
        bits = np.abs(x).astype(np.float32).view(np.int32)
    return np.clip((bits >> shift).astype(np.int64) - base, 0, n_bins - 1)


def best_prefix(ascending: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k that maximises (Σ of the k largest)²/k, and that Σ, per unit.

    The smallest such k, carried on to the end of a run of equal magnitudes.

    Shapes: ascending [units, length], sorted magnitudes
    """
    n_units, length = ascending.shape
    sums = np.cumsum(ascending[:, ::-1], axis=1, dtype=np.float64)
    best = np.argmax(sums * sums / np.arange(1, length + 1), axis=1)
    for unit in range(n_units):
        while (
            best[unit] + 1 < length
            and ascending[unit, length - 2 - best[unit]] == ascending[unit, length - 1 - best[unit]]
        ):
            best[unit] += 1
    return best + 1, sums[np.arange(n_units), best]


def best_quad(ordered: FloatArray) -> NDArray[np.float64]:
    """The d, of either sign, whose levels {−1, 0, 1, 2}·d have the least squared error, per unit.

    Levels given to the weights have an error of Σw² − A²/B with A = Σ level·w, B = Σ level² and
    their best d = A/B. As d falls from infinity, a weight leaves level 0 at 2|w|, and one of d's
    sign leaves level 1 at 2|w|/3: the nearest levels of every d are met on the way, so that the
    largest A²/B is the optimum. Where |w|·3 and |w'| are equal, 2|w| comes first.

    Shapes: ordered [units, length], by ascending magnitude → [units]
    """
    n_units = len(ordered)
    units = np.arange(n_units)
    descending = ordered[:, ::-1].astype(np.float64)
    magnitudes = np.abs(descending)
    gains, scales = np.full(n_units, -1.0), np.zeros(n_units)
    for sign in (1.0, -1.0):
        doubled = sign * descending > 0
        places = np.concatenate([3.0 * magnitudes, np.where(doubled, magnitudes, -1.0)], axis=1)
        order = np.argsort(-places, axis=1, kind="stable")
        steps = np.concatenate([magnitudes, np.where(doubled, magnitudes, 0.0)], axis=1)
        squares = np.concatenate([np.ones(doubled.shape), 3.0 * doubled], axis=1)
        product = np.cumsum(np.take_along_axis(steps, order, axis=1), axis=1)
        energy = np.cumsum(np.take_along_axis(squares, order, axis=1), axis=1)
        gain = product * product / energy
        best = np.argmax(gain, axis=1)
        better = gain[units, best] > gains
        gains = np.where(better, gain[units, best], gains)
        scales = np.where(better, sign * product[units, best] / energy[units, best], scales)
    return scales


def sorted_cells(
    ascending: FloatArray, prefix: NDArray[np.float64], cuts: NDArray[np.float64], n_low: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What `cells` gives, from sorted units and float64 cuts.

    A weight on one of the first n_low cuts belongs to the cell above it, on another to the one
    below; in `cells` they are half of all.

    Shapes: ascending [units, length], prefix [units, length + 1] with prefix[:, i] the sum of the
    i smallest, cuts [units, n_cuts] → two of [units, n_cuts + 1]
    """
    n_units, length = ascending.shape
    below = np.empty((n_units, cuts.shape[1] + 2), dtype=np.int64)  # weights left of each cut
    below[:, 0], below[:, -1] = 0, length
    for j in range(cuts.shape[1]):
        cut = cuts[:, j : j + 1]
        left = ascending < cut if j < n_low else ascending <= cut
        below[:, j + 1] = np.count_nonzero(left, axis=1)
    sums = np.take_along_axis(prefix, below, axis=1)
    return below[:, 1:] - below[:, :-1], sums[:, 1:] - sums[:, :-1]


def squared_sums(x: FloatArray, values: NDArray[np.float32]) -> tuple[float, float]:
    """Σ(x − value)² and Σx², in float64 and in the order of `abs_sums`.

    Shapes: x [length], values [length]
    """
    # PROMOTE: squares of 2e8 weights add up to 0.665 of the truth in float32
    truth = x.astype(np.float64)
    error = truth - values
    found = abs_sums(np.stack([error * error, truth * truth]))
    return float(found[0]), float(found[1])


def coded_sums(
    x: NDArray[Any], trits: NDArray[np.int8], factors: NDArray[np.float32], length: int
) -> tuple[float, float]:
    """`squared_sums` where each `length` values, a multiple of 64 or all, are factor · trit.

    Shapes: x [size], trits [size], factors [ceil(size / length)]
    """
    values = trits * factors.repeat(min(length, x.size))[: x.size]
    return squared_sums(as_floats(x), values.astype(np.float32, copy=False))


def fold(words: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
    """Levels of −1 to 2, a byte each, to two bits each: 1 + level, the first in the lowest bits.

    Shapes: words [length], out [length]
    """
    out[:] = _folded((words.view(np.int8) + np.int8(1)).view("<u4"))


def unfolds(packed: NDArray[np.uint8], words: NDArray[np.uint32], levels: int) -> bool:
    """Whether bytes decode to what `fold` was given, from −1 to 1, or to 2 with 4 levels.

    Shapes: packed [length], words [length]
    """
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    found = (packed[:, None] >> shifts & 3).astype(np.int8) - np.int8(1)
    is_same = np.array_equal(found, words.view(np.int8).reshape(-1, 4))
    return is_same and bool(found.max(initial=-1) <= levels - 2)


def two_bit(x: NDArray[Any], cut: Any, out: NDArray[np.uint8]) -> None:
    """Codes 1 + trit of a flat block, four to a byte, the first in the lowest bits.

    The trit of w is +1 for w > cut, −1 for w < −cut, else 0. The last byte is filled up with the
    code of 0.

    Shapes: x [length], out [ceil(length / 4)]
    """
    x = as_floats(x)
    code = np.ones(-(-x.size // 4) * 4, dtype=np.uint8)
    code[: x.size] += x > cut
    code[: x.size] -= x < -cut
    out[:] = _folded(code.view("<u4"))


def _folded(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Four codes of 0 to 3, a byte each, to two bits each."""
    return (words | words >> 6 | words >> 12 | words >> 18).astype(np.uint8)


def _count(
    index: NDArray[np.int64], values: FloatArray, n: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    counts: NDArray[Any] = np.bincount(index, minlength=n)
    sums: NDArray[Any] = np.bincount(index, weights=values, minlength=n)
    return counts.astype(np.int64, copy=False), sums
