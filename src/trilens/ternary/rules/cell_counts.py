"""Units whose cells can be counted many times: short ones are sorted, long ones are scanned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.kernels import Kernels
from trilens.ternary.rules.unit_scan import UnitScan
from trilens.ternary.weights_view import FloatArray

__all__ = ["CellCounts", "magnitude_counts", "sampled", "signed_counts"]

_SAMPLE = 1 << 14  # weights of a long unit that tell its starts apart


class CellCounts(Protocol):
    """Units whose cells can be counted."""

    @property
    def n_units(self) -> int:
        """How many units."""

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Count and sum of what lies between cuts.

        Shapes: cuts [units, n_cuts], ascending → two of [units, n_cuts + 1]
        """

    def only(self, which: NDArray[np.bool_] | slice) -> CellCounts:
        """These units alone."""


@dataclass(frozen=True, slots=True)
class _LongUnit:
    scan: UnitScan
    magnitudes: bool
    n_units: int = 1

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        if not self.magnitudes:
            return self.scan.cells(cuts)
        n = cuts.shape[1]
        counts, sums = self.scan.cells(np.concatenate([-cuts[:, ::-1], cuts], axis=1))
        inner, outer = slice(n - 1, None, -1), slice(n + 1, None)
        middle = slice(n, n + 1)
        return (
            np.concatenate([counts[:, middle], counts[:, outer] + counts[:, inner]], axis=1),
            # Nobody needs the sum of magnitudes around zero: its level is 0.
            np.concatenate([0 * sums[:, middle], sums[:, outer] - sums[:, inner]], axis=1),
        )

    def only(self, which: NDArray[np.bool_] | slice) -> CellCounts:
        del which  # there is one unit, and nobody asks when it has converged
        return self


@dataclass(frozen=True, slots=True)
class _SortedUnits:
    ascending: FloatArray  # [units, length]; of magnitudes, their negatives
    prefix: NDArray[np.float64]  # [units, length + 1]
    kernels: Kernels
    magnitudes: bool

    @property
    def n_units(self) -> int:
        return len(self.ascending)

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        n_cuts = cuts.shape[1]
        if not self.magnitudes:
            return self.kernels.sorted_cells(self.ascending, self.prefix, cuts, n_cuts // 2)
        # A weight on a cut belongs to the cell nearer to zero, as when it is coded: of negatives
        # to the one above.
        cuts = np.ascontiguousarray(-cuts[:, ::-1])
        counts, sums = self.kernels.sorted_cells(self.ascending, self.prefix, cuts, n_cuts)
        return counts[:, ::-1], -sums[:, ::-1]

    def only(self, which: NDArray[np.bool_] | slice) -> CellCounts:
        return _SortedUnits(
            self.ascending[which], self.prefix[which], self.kernels, self.magnitudes
        )


def signed_counts(scan: UnitScan) -> CellCounts:
    """The weights of the units, ready for many counts.

    Memory: short units take 12 to 16 bytes per weight.
    """
    if scan.n_pieces > 1:
        return _LongUnit(scan, magnitudes=False)
    return _sorted(np.sort(scan.load(0), axis=1), scan.kernels, magnitudes=False)


def magnitude_counts(scan: UnitScan) -> CellCounts:
    """Their magnitudes; the sum in the cell around zero is left open.

    Memory: as of `signed_counts`.
    """
    if scan.n_pieces > 1:
        return _LongUnit(scan, magnitudes=True)
    return _sorted(_negated(scan.load(0)), scan.kernels, magnitudes=True)


def sampled(scan: UnitScan, *, magnitudes: bool) -> CellCounts | None:
    """Evenly spaced weights of a long unit, sorted; None for short units."""
    if scan.n_pieces == 1:
        return None
    step = max(1, scan.length // _SAMPLE)
    found = np.concatenate(scan.over_pieces(lambda x: x[:, ::step].copy()), axis=1)
    values = _negated(found) if magnitudes else np.sort(found, axis=1)
    return _sorted(values, scan.kernels, magnitudes=magnitudes)


def _negated(weights: FloatArray) -> FloatArray:
    negated: FloatArray = np.abs(weights)
    np.negative(negated, out=negated)
    negated.sort(axis=1)
    return negated


def _sorted(ascending: FloatArray, kernels: Kernels, *, magnitudes: bool) -> _SortedUnits:
    prefix = np.zeros((len(ascending), ascending.shape[1] + 1))
    np.cumsum(ascending, axis=1, dtype=np.float64, out=prefix[:, 1:])
    return _SortedUnits(ascending, prefix, kernels, magnitudes)
