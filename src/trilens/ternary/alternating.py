"""Scale and code in turns: least squares for the scales, then the nearest level for each weight.

The levels of a unit are a linear code book: level = Σ scale · entry over the columns of the book.
Each turn can only lower the squared error, and needs only how many weights fell in each cell and
their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.fits import Fit
from trilens.ternary.scan import UnitScan

__all__ = ["Turns", "alternate", "cuts_between"]

_MAX_TURNS = 25
_SETTLED = 1e-6  # largest relative change of a unit's explained energy in the last turn


@dataclass(frozen=True, slots=True)
class Turns:
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

    def or_better(self, other: Turns) -> Turns:
        """For each unit the one of the two that explains more, this one if they are equal."""
        other_is = other.explained > self.explained
        return Turns(
            np.where(other_is[:, None], other.cuts, self.cuts),
            np.where(other_is[:, None, None], other.book, self.book),
            np.where(other_is[:, None], other.scales, self.scales),
            np.where(other_is, other.explained, self.explained),
        )

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


def alternate(scan: UnitScan, book: NDArray[np.float64], start: NDArray[np.float64]) -> Turns:
    """Take turns from the scales `start` until they settle; at most 25 times.

    Shapes: book [n_cells, 2], n_cells odd; start [units, 2]
    """
    best = _turn(scan, book, start)
    latest = best
    for _ in range(_MAX_TURNS - 1):
        latest = _turn(scan, book, latest.scales)
        gained = latest.explained - best.explained
        best = best.or_better(latest)
        if np.all(gained <= _SETTLED * best.explained):
            break
    return best


def _turn(scan: UnitScan, book: NDArray[np.float64], scales: NDArray[np.float64]) -> Turns:
    # PROMOTE: levels by sums of products, not BLAS, whose order depends on the machine
    levels = scales[:, :1] * book[:, 0] + scales[:, 1:] * book[:, 1]
    order = np.argsort(levels, axis=1, kind="stable")
    cuts = cuts_between(np.take_along_axis(levels, order, axis=1))
    ordered = book[order]
    counts, sums = scan.cells(cuts)
    return Turns(cuts, ordered, *_least_squares(ordered, counts, sums, scales))


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
    g11 = np.sum(counts * first * first, axis=1)
    g12 = np.sum(counts * first * second, axis=1)
    g22 = np.sum(counts * second * second, axis=1)
    b1, b2 = np.sum(sums * first, axis=1), np.sum(sums * second, axis=1)
    det = g11 * g22 - g12 * g12
    solvable = det > 1e-9 * g11 * g22
    safe = np.where(solvable, det, 1.0)
    s1 = np.where(solvable, (g22 * b1 - g12 * b2) / safe, previous[:, 0])
    s2 = np.where(solvable, (g11 * b2 - g12 * b1) / safe, previous[:, 1])
    # ‖W‖² − ‖W − Ŵ‖² for any scales: 2 b·s − s·G·s
    explained = 2 * (b1 * s1 + b2 * s2) - (g11 * s1 * s1 + 2 * g12 * s1 * s2 + g22 * s2 * s2)
    return np.stack([s1, s2], axis=1), explained
