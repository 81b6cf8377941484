"""Scale and code in turns: least squares for the scales, then the nearest level for each weight.

The levels of a unit are a linear code book: level = Σ scale · entry over the columns of the book.
Each turn can only lower the squared error, and needs only how many weights fell in each cell and
their sum: short units are sorted once, and each turn then looks up where the cuts fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.fits import Fit
from trilens.ternary.rules.kernels import Kernels
from trilens.ternary.rules.unit_scan import UnitScan
from trilens.ternary.weights_view import FloatArray

__all__ = ["CellCounts", "Minimum", "alternate", "cell_counts", "cuts_between"]

_MAX_TURNS = 25
_CONVERGED = 1e-6  # largest relative change of a unit's explained energy in the last turn

_WORTH_PARTING = 0.75  # converged units are left behind once they are more than a quarter


class CellCounts(Protocol):
    """Units whose cells can be counted."""

    @property
    def n_units(self) -> int:
        """How many units."""

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Count and sum of the weights between cuts; see `plain.cells`."""

    def only(self, which: NDArray[np.bool_]) -> CellCounts:
        """These units alone."""


@dataclass(frozen=True, slots=True)
class _LongUnit:
    scan: UnitScan
    n_units: int = 1

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return self.scan.cells(cuts)

    def only(self, which: NDArray[np.bool_]) -> CellCounts:
        del which  # there is one unit, and nobody asks when it has converged
        return self


@dataclass(frozen=True, slots=True)
class _SortedUnits:
    ascending: FloatArray  # [units, length]
    prefix: NDArray[np.float64]  # [units, length + 1]
    kernels: Kernels

    @property
    def n_units(self) -> int:
        return len(self.ascending)

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return self.kernels.sorted_cells(self.ascending, self.prefix, cuts)

    def only(self, which: NDArray[np.bool_]) -> CellCounts:
        return _SortedUnits(self.ascending[which], self.prefix[which], self.kernels)


def cell_counts(scan: UnitScan) -> CellCounts:
    """The units, ready for many turns.

    Memory: short units take 12 to 16 bytes per weight.
    """
    if scan.n_pieces > 1:
        return _LongUnit(scan)
    ascending = np.sort(scan.load(0), axis=1)
    prefix = np.zeros((len(ascending), ascending.shape[1] + 1))
    np.cumsum(ascending, axis=1, dtype=np.float64, out=prefix[:, 1:])
    return _SortedUnits(ascending, prefix, scan.kernels)


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where the turns ended for each unit.

    Attributes:
        cuts: [units, n_cells − 1].
        book: [units, n_cells, columns], the code book's rows in the order of the unit's levels.
        scales: [units, columns], the least-squares scales for these cuts.
        explained: [units], ‖W‖² − ‖W − Ŵ‖².
    """

    cuts: NDArray[np.float64]
    book: NDArray[np.float64]
    scales: NDArray[np.float64]
    explained: NDArray[np.float64]

    def only(self, which: NDArray[np.bool_]) -> Minimum:
        """These units alone."""
        return Minimum(
            self.cuts[which], self.book[which], self.scales[which], self.explained[which]
        )

    def with_better(self, units: NDArray[np.int64], other: Minimum) -> Minimum:
        """The same, but of the units numbered `units` whatever explains more.

        Shapes: units [some], other of these
        """
        better = other.explained > self.explained[units]
        changed = Minimum(
            self.cuts.copy(), self.book.copy(), self.scales.copy(), self.explained.copy()
        )
        where = units[better]
        changed.cuts[where] = other.cuts[better]
        changed.book[where] = other.book[better]
        changed.scales[where] = other.scales[better]
        changed.explained[where] = other.explained[better]
        return changed

    def fit(self, *, offset: bool) -> Fit:
        """As a fit whose scales are not negative and descend; `offset`: the last column is none.

        With `offset` the book's last column is all ones, and its scale the unit's offset.
        """
        n_planes = self.scales.shape[1] - offset
        scales = self.scales[:, :n_planes]
        order = np.argsort(-np.abs(scales), axis=1, kind="stable")
        flipped = np.where(scales < 0, -1.0, 1.0)
        trits = (self.book[:, :, :n_planes] * flipped[:, None]).astype(np.int8).transpose(0, 2, 1)
        return Fit(
            self.cuts,
            np.take_along_axis(np.abs(scales), order, axis=1),
            self.scales[:, -1] if offset else None,
            np.take_along_axis(trits, order[:, :, None], axis=1),
        )


def alternate(counts: CellCounts, book: NDArray[np.float64], start: NDArray[np.float64]) -> Minimum:
    """Alternate from the scales `start` until they converge; at most 25 times.

    Shapes: book [n_cells, 2], n_cells odd; start [units, 2]
    """
    latest = _turn(counts, book, start)
    best = latest
    open_units = np.arange(counts.n_units)
    for _ in range(_MAX_TURNS - 1):
        latest = _turn(counts, book, latest.scales)
        gained = latest.explained - best.explained[open_units]
        best = best.with_better(open_units, latest)
        still = gained > _CONVERGED * latest.explained
        if not still.any():
            break
        if np.count_nonzero(still) < _WORTH_PARTING * len(still):
            open_units, counts, latest = open_units[still], counts.only(still), latest.only(still)
    return best


def _turn(counts: CellCounts, book: NDArray[np.float64], scales: NDArray[np.float64]) -> Minimum:
    # PROMOTE: levels by sums of products, not BLAS, whose order depends on the machine
    levels = scales[:, :1] * book[:, 0] + scales[:, 1:] * book[:, 1]
    order = np.argsort(levels, axis=1, kind="stable")
    cuts = cuts_between(np.take_along_axis(levels, order, axis=1))
    ordered = book[order]
    return Minimum(cuts, ordered, *_least_squares(ordered, *counts.cells(cuts), scales))


def cuts_between(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Midpoints of neighbouring levels.

    Shapes: levels [units, n_cells], ascending → [units, n_cells − 1]
    """
    return levels[:, :-1] + 0.5 * (levels[:, 1:] - levels[:, :-1])


def _least_squares(
    book: NDArray[np.float64],
    counts: NDArray[np.int64],
    sums: NDArray[np.float64],
    previous: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two scales that are best for these cells, and the energy they explain.

    Where the cells leave a scale open (no weight in a cell that uses it), it keeps its value.
    """
    first, second = book[..., 0], book[..., 1]
    g11 = _over_cells(counts * first * first)
    g12 = _over_cells(counts * first * second)
    g22 = _over_cells(counts * second * second)
    b1, b2 = _over_cells(sums * first), _over_cells(sums * second)
    det = g11 * g22 - g12 * g12
    solvable = det > 1e-9 * g11 * g22
    safe = np.where(solvable, det, 1.0)
    s1 = np.where(solvable, (g22 * b1 - g12 * b2) / safe, previous[:, 0])
    s2 = np.where(solvable, (g11 * b2 - g12 * b1) / safe, previous[:, 1])
    # ‖W‖² − ‖W − Ŵ‖² for any scales: 2 b·s − s·G·s
    explained = 2 * (b1 * s1 + b2 * s2) - (g11 * s1 * s1 + 2 * g12 * s1 * s2 + g22 * s2 * s2)
    return np.stack([s1, s2], axis=1), explained


def _over_cells(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over the last axis, which is too short for NumPy to be fast along it."""
    total: NDArray[np.float64] = values[:, 0].copy()
    for cell in range(1, values.shape[1]):
        total += values[:, cell]
    return total
