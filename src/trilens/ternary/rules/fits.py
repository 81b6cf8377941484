"""What a rule finds for its units: where to cut, and what each cell stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit", "keep_ternary", "one_plane"]


@dataclass(frozen=True, slots=True)
class Fit:
    """How to code units.

    Shapes: planes 1 or 2; n_cuts 2 for one plane, 4 for one of four levels, 8 for two

    Attributes:
        cuts: [units, n_cuts], ascending.
        scales: [units, planes], the unrounded factor of each plane's trits; negative for four
            levels alone.
        offsets: [units], what is added to every weight of a unit; None for rules without it.
        tables: [units, planes, n_cuts + 1], the trits of each cell.
    """

    cuts: NDArray[np.float64]
    scales: NDArray[np.float64]
    offsets: NDArray[np.float64] | None
    tables: NDArray[np.int8]


def one_plane(
    cuts: NDArray[np.float64],
    scales: NDArray[np.float64],
    offsets: NDArray[np.float64] | None = None,
) -> Fit:
    """A fit with one plane of trits.

    Shapes: cuts [units, 2] or, where they are symmetric, [units]; scales [units]
    """
    if cuts.ndim == 1:
        cuts = np.stack([-cuts, cuts], axis=1)
    tables = np.broadcast_to(np.array([-1, 0, 1], dtype=np.int8), (len(scales), 1, 3))
    return Fit(cuts, scales[:, None], offsets, tables)


def keep_ternary(fit: Fit, magnitudes: NDArray[np.float64]) -> Fit:
    """The same fit, but units that were ternary keep their trits and their own scale.

    Shapes: magnitudes [units], negative where a unit was not ternary
    """
    which = magnitudes >= 0
    if not which.any():
        return fit
    middle = fit.cuts.shape[1] // 2
    cuts, scales, tables = fit.cuts.copy(), fit.scales.copy(), fit.tables.copy()
    cuts[which, :middle], cuts[which, middle:] = -np.inf, np.inf
    cuts[which, middle - 1 : middle + 1] = 0.0
    scales[which] = 0.0
    scales[which, 0] = magnitudes[which]
    tables[which] = 0
    tables[which, 0, middle - 1], tables[which, 0, middle + 1] = -1, 1
    offsets = fit.offsets
    if offsets is not None:
        offsets = np.where(which, 0.0, offsets)
    return replace(fit, cuts=cuts, scales=scales, offsets=offsets, tables=tables)
