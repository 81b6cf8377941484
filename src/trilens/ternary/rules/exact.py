"""The trits and scale with the least squared error, found without trying every threshold.

For trits that keep the k largest magnitudes with sum S the best scale is S/k and the squared error
Σw² − S²/k: the optimum maximises S²/k. Short units are sorted. A long unit is counted once into
bins of its magnitudes' float32 bit patterns; S²/k is then known at every bin's edge and bounded
inside it, and only the weights of bins that can beat the best edge are sorted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.numpy_kernels import bins
from trilens.ternary.rules.unit_scan import UnitScan
from trilens.ternary.weights_view import FloatArray

__all__ = ["best_survivors"]

_N_BINS = 2048
_SHIFT = 15  # 256 bins an octave: the window of 8 octaves reaches from a quarter of mean|w| to 64×
_ROUNDING = 1e-9  # bins within this of the best edge are searched too


def best_survivors(
    scan: UnitScan, abs_sums: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """(cut, k, S): the k weights with |w| > cut have the magnitude sum S that maximises S²/k.

    Shapes: abs_sums [units] → three of [units]

    Memory: a long unit needs the weights in the bins that can hold the optimum at once: a few per
    cent of it for the distributions that weights have, all of it when all magnitudes agree within
    0.4 %.
    """
    if scan.n_pieces == 1:
        return _by_sorting(scan)
    return _by_bins(scan, float(abs_sums[0]) / scan.length)


def _by_sorting(
    scan: UnitScan,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    ascending = np.abs(scan.load(0))
    ascending.sort(axis=1)
    best, sums = scan.kernels.best_prefix(ascending)
    units = np.arange(scan.n_units)
    left_out = ascending[units, np.maximum(scan.length - 1 - best, 0)]
    return np.where(best < scan.length, left_out, 0.0).astype(np.float64), best, sums


def _by_bins(
    scan: UnitScan, mean: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    # No weight below mean/(1 + √2) is ever worth keeping: with the others it lowers S²/k.
    base = int(np.float32(mean / 4).view(np.int32)) >> _SHIFT
    found = scan.over_pieces(lambda x: scan.kernels.histogram(x.reshape(-1), base, _SHIFT, _N_BINS))
    counts, sums = found[0]
    for more_counts, more_sums in found[1:]:
        counts, sums = counts + more_counts, sums + more_sums
    above_k = np.cumsum(counts[::-1])[::-1] - counts
    above_sum = np.append(np.cumsum(sums[:0:-1])[::-1], 0.0)
    open_bins = _promising(counts, sums, above_k, above_sum, _edges(base), 0.4 * mean)

    def of_open_bins(x: FloatArray) -> FloatArray:
        flat = x.reshape(-1)
        return np.abs(flat[open_bins[bins(flat, base, _SHIFT, _N_BINS)]])

    descending = np.sort(np.concatenate(scan.over_pieces(of_open_bins)))[::-1]
    best_gain, best_k, best_sum, cut = -1.0, 0, 0.0, 0.0
    start = 0
    for b in np.flatnonzero(open_bins)[::-1]:
        inside = descending[start : start + counts[b]]
        start += int(counts[b])
        totals = above_sum[b] + np.cumsum(inside, dtype=np.float64)
        gains = totals * totals / (above_k[b] + np.arange(1, len(inside) + 1))
        top = int(np.argmax(gains))
        while top + 1 < len(inside) and inside[top + 1] == inside[top]:
            top += 1  # equal magnitudes stay together; inside a run S²/k is below one of its ends
        if gains[top] > best_gain:
            best_gain, best_k, best_sum = float(gains[top]), int(above_k[b]) + top + 1, totals[top]
            cut = _next_below(inside[top])
    return np.array([cut]), np.array([best_k]), np.array([best_sum], dtype=np.float64)


def _promising(
    counts: NDArray[np.int64],
    sums: NDArray[np.float64],
    above_k: NDArray[np.int64],
    above_sum: NDArray[np.float64],
    edges: NDArray[np.float64],
    never: float,
) -> NDArray[np.bool_]:
    """Bins whose inside may beat the best S²/k at an edge, `[bins]`.

    The j largest of a bin with count c, sum s and values in [lo, hi] add at most
    min(j·hi, s − (c − j)·lo). On both sides of where these two meet, the bound on S²/k is convex
    in j, so that it is largest at an edge of the bin or where they meet.
    """
    at_edge = (above_sum + sums) ** 2 / np.maximum(above_k + counts, 1)
    # PROMOTE: float64 weights were rounded to float32 before they were counted
    low, high = edges[:-1] * (1 - 1e-6), edges[1:] * (1 + 1e-6)
    meet = (sums - counts * low) / np.maximum(high - low, np.finfo(np.float64).tiny)
    meet = np.clip(meet, 0.0, counts)
    bound = (above_sum + np.minimum(meet * high, sums)) ** 2 / np.maximum(above_k + meet, 1)
    bound[-1] = sums[-1] ** 2  # no upper limit: as if one weight had it all
    bound = np.maximum(bound, at_edge)
    possible: NDArray[np.bool_] = (counts > 0) & (edges[1:] > never)
    worth: NDArray[np.bool_] = bound >= at_edge[possible].max() * (1 - _ROUNDING)
    return possible & worth


def _edges(base: int) -> NDArray[np.float64]:
    """Lower edges of the bins and the upper one of the last; the first bin begins at 0."""
    bits = (np.arange(_N_BINS + 1, dtype=np.int64) + base) << _SHIFT
    largest = int(np.finfo(np.float32).max.view(np.int32))
    edges: NDArray[np.float64] = (
        np.minimum(bits, largest).astype(np.int32).view(np.float32).astype(np.float64)
    )
    edges[0] = 0.0
    return edges


def _next_below(value: np.floating[Any]) -> float:
    return float(np.nextafter(value, value.dtype.type(0)))
