"""Alternating minimisation: least squares for the scales, then the nearest level for each weight.

A step can only lower the squared error, and needs only how many weights fell in each cell and
their sum. It ends in the local optimum of its start. Which start leads to the best one depends on
the unit and shows after a few steps: all starts take one, the best of each unit a few more, and
the very best goes on until it converges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.cell_counts import CellCounts

__all__ = ["Point", "Start", "Step", "least_squares", "minimise"]

_CARRIED_ON = 4  # starts of each unit after the first step
_MORE_STEPS = 3  # of those
_MAX_STEPS = 25  # of the one that is left
_CONVERGED = 1e-6  # largest relative change of a unit's explained energy in the last step

_WORTH_PARTING = 0.75  # converged units are left behind once they are more than a quarter
_AT_ONCE = 1 << 13  # units whose starts are held in memory together

Vector: TypeAlias = NDArray[np.float64]
Start: TypeAlias = tuple[Vector, Vector]
"""The two scales `[units]` of each unit where a search begins."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where a step ended for each unit.

    Attributes:
        cut_by: [units, 2], the scales whose levels cut the unit into cells.
        scales: [units, 2], the least-squares scales for these cells.
        explained: [units], ‖W‖² − ‖W − Ŵ‖².
    """

    cut_by: Vector
    scales: Vector
    explained: Vector

    def only(self, which: NDArray[np.bool_] | slice) -> Point:
        """These units alone."""
        return Point(self.cut_by[which], self.scales[which], self.explained[which])

    def with_better(self, units: NDArray[np.int64], other: Point) -> Point:
        """The same, but of the units numbered `units` whatever explains more.

        Shapes: units [some], other of these
        """
        better = other.explained > self.explained[units]
        changed = Point(self.cut_by.copy(), self.scales.copy(), self.explained.copy())
        where = units[better]
        changed.cut_by[where] = other.cut_by[better]
        changed.scales[where] = other.scales[better]
        changed.explained[where] = other.explained[better]
        return changed


Step: TypeAlias = Callable[[CellCounts, Vector], Point]
"""From units and scales `[units, 2]` to the point that one step leads to."""


def minimise(
    step: Step, counts: CellCounts, starts: Sequence[Start], sample: CellCounts | None = None
) -> Point:
    """The best point that alternating from any of the starts leads to, as far as it shows early.

    It explains at least as much as the first step from any start does.

    Args:
        step: one step of the rule.
        counts: the units.
        starts: where to begin; the first one, which must not be lost, is tried on a sampled unit
            too.
        sample: some weights of a single long unit, on which starts are told apart.
    """
    if sample is not None:
        chosen = _best_start(step, sample, starts).scales
        first = np.stack(starts[0], axis=1)
        reached = [_converge(step, counts, step(counts, chosen))]
        least = step(counts, first)
        if least.explained[0] > reached[0].explained[0]:
            reached.append(_converge(step, counts, least))
        return reached[-1]
    parts = [slice(at, at + _AT_ONCE) for at in range(0, counts.n_units, _AT_ONCE)]
    found = []
    for part in parts:
        own = counts if len(parts) == 1 else counts.only(part)
        begin = _best_start(step, own, [(one[part], two[part]) for one, two in starts])
        found.append(_converge(step, own, begin))
    return Point(
        np.concatenate([point.cut_by for point in found]),
        np.concatenate([point.scales for point in found]),
        np.concatenate([point.explained for point in found]),
    )


def _best_start(step: Step, counts: CellCounts, starts: Sequence[Start]) -> Point:
    points = [step(counts, np.stack(start, axis=1)) for start in starts]
    explained = np.stack([point.explained for point in points])
    scales = np.stack([point.scales for point in points])
    order = np.argsort(-explained, axis=0, kind="stable")[:_CARRIED_ON]
    units = np.arange(counts.n_units)
    best: Point | None = None
    for which in order:
        latest = step(counts, scales[which, units])
        for _ in range(_MORE_STEPS - 1):
            latest = step(counts, latest.scales)
        best = latest if best is None else best.with_better(units, latest)
    # Rounding may let a step explain a little less than the one before.
    first = Point(
        np.stack([point.cut_by for point in points])[order[0], units],
        scales[order[0], units],
        explained[order[0], units],
    )
    return first if best is None else first.with_better(units, best)


def _converge(step: Step, counts: CellCounts, latest: Point) -> Point:
    best = latest
    open_units = np.arange(counts.n_units)
    for _ in range(_MAX_STEPS - 1):
        latest = step(counts, latest.scales)
        gained = latest.explained - best.explained[open_units]
        best = best.with_better(open_units, latest)
        still = gained > _CONVERGED * latest.explained
        if not still.any():
            break
        if np.count_nonzero(still) < _WORTH_PARTING * len(still):
            open_units, counts, latest = open_units[still], counts.only(still), latest.only(still)
    return best


def least_squares(
    gram: tuple[Vector, Vector, Vector], products: tuple[Vector, Vector], previous: Vector
) -> tuple[Vector, Vector]:
    """The two scales that are best for some cells, and the energy they explain.

    Where the cells leave a scale open (no weight in a cell that uses it), both keep their value.

    Shapes: all [units] but previous [units, 2] → [units, 2] and [units]

    Args:
        gram: Σ first², Σ first · second and Σ second² over the weights' entries of the code book.
        products: Σ weight · first and Σ weight · second.
        previous: the scales before.
    """
    (g11, g12, g22), (b1, b2) = gram, products
    det = g11 * g22 - g12 * g12
    solvable = det > 1e-9 * g11 * g22
    safe = np.where(solvable, det, 1.0)
    s1 = np.where(solvable, (g22 * b1 - g12 * b2) / safe, previous[:, 0])
    s2 = np.where(solvable, (g11 * b2 - g12 * b1) / safe, previous[:, 1])
    # ‖W‖² − ‖W − Ŵ‖² for any scales: 2 b·s − s·G·s
    explained = 2 * (b1 * s1 + b2 * s2) - (g11 * s1 * s1 + 2 * g12 * s1 * s2 + g22 * s2 * s2)
    return np.stack([s1, s2], axis=1), explained
