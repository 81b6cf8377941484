"""The rules that search for two scales: three levels around an offset, nine of two planes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.alternating import Point, Start, least_squares, minimise
from trilens.ternary.rules.cell_counts import (
    CellCounts,
    magnitude_counts,
    sampled,
    signed_counts,
)
from trilens.ternary.rules.fits import Fit, one_plane
from trilens.ternary.rules.unit_scan import UnitScan

__all__ = ["fit_nine_levels", "fit_three_levels"]

Vector = NDArray[np.float64]

# Both scales over the mean magnitude; optima of Gaussian, Laplace and trained units lie between.
_LARGER = (0.8, 1.1, 1.5, 2.0, 2.6)
_RATIOS = (0.2, 0.33, 0.5, 0.6, 0.75)

# The scale over the mean distance from the mean, and how far the middle level is from the mean.
_SPREADS = (1.1, 1.7)
_SHIFTS = (-0.9, -0.4, 0.0, 0.4, 0.9)


def fit_three_levels(scan: UnitScan, symmetric: Vector) -> Fit:
    """Scales and offsets [units] of the levels μ − α, μ and μ + α.

    Args:
        scan: the units.
        symmetric: [units], the best scales without an offset, which are improved on.
    """
    counts = signed_counts(scan)
    centre, spread = _centre(counts, scan.length)
    starts: list[Start] = [(symmetric, np.zeros_like(symmetric))]
    starts += [(a * spread, centre + shift * spread) for shift in _SHIFTS for a in _SPREADS]
    best = minimise(_three_levels_step, counts, starts, sampled(scan, magnitudes=False))
    scales, offsets = best.scales[:, 0], best.scales[:, 1]
    fit = one_plane(_three_levels_cuts(best.cut_by), np.abs(scales), offsets)
    tables = fit.tables * np.where(scales < 0, -1, 1).astype(np.int8)[:, None, None]
    return Fit(fit.cuts, fit.scales, fit.offsets, tables)


def _three_levels_cuts(scales: Vector) -> Vector:
    half = 0.5 * scales[:, 0]
    return np.stack([scales[:, 1] - half, scales[:, 1] + half], axis=1)


def _three_levels_step(counts: CellCounts, start: Vector) -> Point:
    cut_by = np.stack([np.abs(start[:, 0]), start[:, 1]], axis=1)
    n, sums = counts.cells(_three_levels_cuts(cut_by))
    low, middle, high = n.astype(np.float64).T
    gram = (low + high, high - low, low + middle + high)
    products = (sums[:, 2] - sums[:, 0], sums[:, 0] + sums[:, 1] + sums[:, 2])
    return Point(cut_by, *least_squares(gram, products, cut_by))


def _centre(counts: CellCounts, length: int) -> tuple[Vector, Vector]:
    """The units' mean, and their mean distance from it."""
    _, sums = counts.cells(np.zeros((counts.n_units, 2)))
    centre = np.sum(sums, axis=1) / length
    n, sums = counts.cells(np.stack([centre, centre], axis=1))
    distance = (sums[:, 2] - n[:, 2] * centre) - (sums[:, 0] - n[:, 0] * centre)
    return centre, distance / length


def fit_nine_levels(scan: UnitScan, one_scale: Vector, abs_sums: Vector) -> Fit:
    """Scales [units, 2] of the levels 0, ±b, ±(a − b), ±a and ±(a + b), with a ≥ b ≥ 0.

    Args:
        scan: the units.
        one_scale: [units], the best scales of one plane, which are improved on.
        abs_sums: [units], Σ|w|.
    """
    mean = abs_sums / scan.length
    starts: list[Start] = [(one_scale, np.zeros_like(one_scale))]
    starts += [(a * mean, a * ratio * mean) for a in _LARGER for ratio in _RATIOS]
    counts, sample = magnitude_counts(scan), sampled(scan, magnitudes=True)
    return _nine_levels_fit(minimise(_nine_levels_step, counts, starts, sample))


def _nine_levels_cuts(scales: Vector) -> Vector:
    """Between the magnitudes of the levels: [units, 4], ascending."""
    a, b = scales[:, 0], scales[:, 1]
    low, middle = np.minimum(b, a - b), np.maximum(b, a - b)
    return np.stack(
        [0.5 * low, low + 0.5 * (middle - low), middle + 0.5 * (a - middle), a + 0.5 * b], axis=1
    )


def _nine_levels_step(counts: CellCounts, start: Vector) -> Point:
    one, two = np.abs(start[:, 0]), np.abs(start[:, 1])
    cut_by = np.stack([np.maximum(one, two), np.minimum(one, two)], axis=1)
    n, sums = counts.cells(_nine_levels_cuts(cut_by))
    n_both, n_a = n[:, 4].astype(np.float64), n[:, 3].astype(np.float64)
    n_b, n_gap = _b_and_gap(cut_by, n[:, 1:3].astype(np.float64))
    sum_b, sum_gap = _b_and_gap(cut_by, sums[:, 1:3])
    gram = (n_both + n_a + n_gap, n_both - n_gap, n_both + n_b + n_gap)
    products = (sums[:, 4] + sums[:, 3] + sum_gap, sums[:, 4] + sum_b - sum_gap)
    return Point(cut_by, *least_squares(gram, products, cut_by))


def _b_and_gap(scales: Vector, inner: Vector) -> tuple[Vector, Vector]:
    """What belongs to the levels b and a − b, of which the smaller comes first."""
    b_first = _b_first(scales)
    return (
        np.where(b_first, inner[:, 0], inner[:, 1]),
        np.where(b_first, inner[:, 1], inner[:, 0]),
    )


def _b_first(scales: Vector) -> NDArray[np.bool_]:
    first: NDArray[np.bool_] = scales[:, 1] <= scales[:, 0] - scales[:, 1]
    return first


_B, _GAP, _A, _BOTH = (0, 1), (1, -1), (1, 0), (1, 1)
_BOOKS = np.array([[_GAP, _B, _A, _BOTH], [_B, _GAP, _A, _BOTH]], dtype=np.int8)


def _nine_levels_fit(best: Point) -> Fit:
    """As a fit whose scales are not negative and descend."""
    outer = _BOOKS[_b_first(best.cut_by).astype(np.intp)]  # [units, 4 levels, 2 planes]
    middle = np.zeros_like(outer[:, :1])
    book = np.concatenate([-outer[:, ::-1], middle, outer], axis=1)
    trits = (book * np.where(best.scales < 0, -1, 1).astype(np.int8)[:, None]).transpose(0, 2, 1)
    order = np.argsort(-np.abs(best.scales), axis=1, kind="stable")
    cuts = _nine_levels_cuts(best.cut_by)
    return Fit(
        np.concatenate([-cuts[:, ::-1], cuts], axis=1),
        np.take_along_axis(np.abs(best.scales), order, axis=1),
        None,
        np.take_along_axis(trits, order[:, :, None], axis=1),
    )
