"""Four levels {−1, 0, 1, 2}·d with a signed d: what two bits hold, and GGUF's Q2_0 with them.

Short units: the optimum, found by going through every d at which a weight changes its level
(`numpy_kernels.best_quad`). A unit of more than 2²⁰ weights: the best of alternating minimisation
from many starts, of which the ternary optimum is one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.alternating import Point, Start, minimise
from trilens.ternary.rules.cell_counts import CellCounts, sampled, signed_counts
from trilens.ternary.rules.fits import Fit
from trilens.ternary.rules.unit_scan import UnitScan
from trilens.ternary.weights_view import FloatArray

__all__ = ["fit_four_levels", "search_four_levels"]

Vector = NDArray[np.float64]

# d over the mean magnitude; optima of Gaussian, Laplace, uniform and trained units lie between.
_STARTS = (0.45, 0.6, 0.8, 1.0, 1.3, 1.7)

# The levels of the five cells, by whether d is negative; the outermost cell is empty.
_LEVELS = np.array([[-1, -1, 0, 1, 2], [2, 1, 0, -1, -1]], dtype=np.int8)


def fit_four_levels(scan: UnitScan) -> Fit:
    """The levels −d, 0, d and 2d of short units that have the least squared error there is."""
    return _fit(scan.kernels.best_quad(_by_magnitude(scan.load(0))))


def search_four_levels(scan: UnitScan, ternary: Vector, abs_sums: Vector) -> Fit:
    """The levels −d, 0, d and 2d of a long unit, at least as good as the three it begins at.

    Args:
        scan: the unit.
        ternary: [1], its best scale of three levels.
        abs_sums: [1], Σ|w|.
    """
    mean = abs_sums / scan.length
    none = np.zeros_like(mean)
    starts: list[Start] = [(ternary, none)]
    starts += [(sign * a * mean, none) for a in _STARTS for sign in (1, -1)]
    sample = sampled(scan, magnitudes=False)
    return _fit(minimise(_step, signed_counts(scan), starts, sample).scales[:, 0])


def _fit(scales: Vector) -> Fit:
    tables = _LEVELS[(scales < 0).astype(np.intp)][:, None]
    return Fit(_cuts(scales), scales[:, None], None, tables)


def _cuts(scales: Vector) -> Vector:
    """Between the levels, ascending, with one more so that there are as many on both sides.

    Shapes: scales [units] → [units, 4]
    """
    halves = np.sort(scales[:, None] * np.array([-0.5, 0.5, 1.5]), axis=1)
    far = np.full((len(scales), 1), np.inf)
    positive = np.concatenate([-far, halves], axis=1)
    negative = np.concatenate([halves, far], axis=1)
    return np.where(scales[:, None] < 0, negative, positive)


def _step(counts: CellCounts, start: Vector) -> Point:
    scales = start[:, 0]
    n, sums = counts.cells(_cuts(scales))
    levels = _LEVELS[(scales < 0).astype(np.intp)].astype(np.float64)
    product, energy = np.sum(levels * sums, axis=1), np.sum(levels * levels * n, axis=1)
    found = np.where(energy > 0, product / np.maximum(energy, 1.0), scales)
    explained = found * (2 * product - found * energy)
    none = np.zeros_like(found)
    return Point(start, np.stack([found, none], axis=1), explained)


def _by_magnitude(x: FloatArray) -> FloatArray:
    """Each unit by ascending magnitude, signs kept, +w before −w.

    As whole numbers, the sign moved from the highest bit to the lowest: sorted ten times as fast as
    by an order of magnitudes.
    """
    width = 8 * x.dtype.itemsize
    kind = np.dtype(f"u{x.dtype.itemsize}")
    one, rest = kind.type(1), kind.type(width - 1)
    bits = x.view(kind)
    keys = bits << one | bits >> rest
    keys.sort(axis=1)
    ordered: FloatArray = (keys >> one | keys << rest).view(x.dtype)
    return ordered
