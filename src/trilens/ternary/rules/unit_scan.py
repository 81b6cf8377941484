"""What a rule may ask about units of equal length, without holding more than a block of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.rules.kernels import Kernels, parallel_map
from trilens.ternary.weights_view import FloatArray, as_floats

__all__ = ["UnitScan", "inner_cuts"]

_T = TypeVar("_T")
_Number = TypeVar("_Number", np.int64, np.float64)

_FIRST_LOOK = 16  # weights that tell nearly every unit apart from a ternary one


@dataclass(frozen=True, slots=True)
class UnitScan:
    """Units of one length: many short ones in one piece, or one long one in several.

    Attributes:
        n_units: How many units.
        length: Weights in each.
        n_pieces: Pieces they are read in; more than one only where `n_units` is 1.
        stored: Piece number → weights [n_units, weights of the piece], see `WeightsView.stored`.
        kernels: The loops.
    """

    n_units: int
    length: int
    n_pieces: int
    stored: Callable[[int], NDArray[Any]]
    kernels: Kernels

    def load(self, piece: int) -> FloatArray:
        """A piece as numbers.

        Shapes: → [n_units, weights of the piece]
        """
        return as_floats(self.stored(piece))

    def over_pieces(self, function: Callable[[FloatArray], _T]) -> list[_T]:
        """`function` of every piece, in order."""

        def of(piece: int) -> _T:
            with np.errstate(over="ignore", invalid="ignore"):  # huge float64: refused later
                return function(self.load(piece))

        return parallel_map(of, range(self.n_pieces))

    def abs_sums(self) -> NDArray[np.float64]:
        """Σ|w|, `[units]`."""

        def of(piece: int) -> NDArray[np.float64]:
            with np.errstate(over="ignore", invalid="ignore"):
                return self.kernels.abs_sums(self.stored(piece))

        return _added(parallel_map(of, range(self.n_pieces)))

    def cells(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Count and sum of the weights between cuts.

        Shapes: cuts [units, n_cuts] → two of [units, n_cuts + 1]
        """
        found = self.over_pieces(lambda x: self.kernels.cells(x, inner_cuts(cuts, x.dtype)))
        return _added([counts for counts, _ in found]), _added([sums for _, sums in found])

    def survivors(self, cuts: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """How many |w| are above the unit's cut, and their sum.

        Shapes: cuts [units] → two of [units]
        """
        counts, sums = self.cells(np.stack([-cuts, cuts], axis=1))
        return counts[:, 0] + counts[:, 2], sums[:, 2] - sums[:, 0]

    def ternary_magnitudes(self) -> NDArray[np.float64]:
        """The c of units whose weights are all −c, 0 or +c (0 where all are zero), else −1.

        Shapes: [units]
        """
        look = np.abs(as_floats(self.stored(0)[:, :_FIRST_LOOK]))
        found: NDArray[np.float64] = np.max(look, axis=1).astype(
            np.float64
        )  # NaN stays NaN and matches nothing
        found[~_only(look, found)] = -1.0
        for piece in range(self.n_pieces):
            maybe = np.flatnonzero(found >= 0)
            if maybe.size == 0:
                break
            magnitudes = np.abs(as_floats(self.stored(piece)[maybe]))
            # A unit may begin with zeros only: c is then what comes later.
            top = np.maximum(found[maybe], np.max(magnitudes, axis=1))
            same = (found[maybe] == 0) | (found[maybe] == top)
            good = same & np.isfinite(top) & _only(magnitudes, top)
            found[maybe] = np.where(good, top, -1.0)
        return found


def inner_cuts(cuts: NDArray[np.float64], dtype: np.dtype[np.floating]) -> FloatArray:
    """The cuts in the weights' dtype, moved towards the middle one where they are between values.

    No weight of that dtype lies between a cut and the rounded one, so that every comparison comes
    out as it would in float64.
    """
    with np.errstate(over="ignore", under="ignore"):
        rounded = cuts.astype(dtype)
    if dtype == np.float64:
        return rounded
    half = cuts.shape[1] // 2
    low, high = rounded[:, :half], rounded[:, half:]
    # `where` also computes the neighbours that it does not take: beyond the largest value is Inf.
    with np.errstate(over="ignore", under="ignore"):
        low[:] = np.where(low < cuts[:, :half], np.nextafter(low, np.float32(np.inf)), low)
        high[:] = np.where(high > cuts[:, half:], np.nextafter(high, np.float32(-np.inf)), high)
    return rounded


def _only(magnitudes: FloatArray, c: NDArray[np.float64]) -> NDArray[np.bool_]:
    only: NDArray[np.bool_] = np.all((magnitudes == 0) | (magnitudes == c[:, None]), axis=1)
    return only


def _added(parts: list[NDArray[_Number]]) -> NDArray[_Number]:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
