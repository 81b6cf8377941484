"""Trits and scales under a Hessian: coded column by column, then improved until nothing helps.

`Grid` holds what is being worked on; every function here takes it and a target W, and lowers (or
at least does not raise) Σ (ŵ − w) H (ŵ − w)ᵀ over the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.ternary.calibrated import numba_kernels, numpy_kernels
from trilens.ternary.calibrated.hessian import FloatMatrix, Hessian, upper_factor
from trilens.ternary.granularity import Units
from trilens.ternary.rules.coder import ScaleDtype, round_scales
from trilens.ternary.rules.kernels import Backend, numba_is_here, parallel_map

__all__ = ["Grid", "code_in_order", "coding_order", "improve_trits", "loss", "refit_scales"]


_BLOCK = 128  # columns coded before their errors are passed on to all that follow, by BLAS
_ROWS = 64  # rows that one thread takes at a time
_SWEEPS = 50  # at most; a sweep that changes nothing is the last
_CONVERGED = 1e-6  # of the loss: a sweep that gains less is the last
_NOTHING = 1e-12  # of a row's energy under H: rounding, no gain
_WORTH_COMPILING = 1 << 14  # weights


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Ŵ as trits and scales.

    Shapes: planes 1 or 2; groups the scales that a row has

    Attributes:
        trits: int8 [rows, planes, cols].
        scales: float64 [rows, groups, planes], not negative but with four levels; equal rows for
            one scale per tensor.
        groups: int64 [cols], which of a row's scales a column has.
        units: What shares a scale.
        levels: 3, or 4 where 2 is a level too.
    """

    trits: NDArray[np.int8]
    scales: FloatMatrix
    groups: NDArray[np.int64]
    units: Units
    levels: int = 3

    @classmethod
    def empty(cls, units: Units, scales: NDArray[Any], *, levels: int = 3) -> Grid:
        """Scales without trits yet.

        Shapes: scales [units, planes]
        """
        planes = scales.shape[1]
        per_row = np.broadcast_to(
            scales.astype(np.float64).reshape(-1, units.per_row, planes),
            (units.rows, units.per_row, planes),
        )
        groups = np.arange(units.cols) // units.length if units.per == "group" else None
        return cls(
            np.zeros((units.rows, planes, units.cols), dtype=np.int8),
            np.ascontiguousarray(per_row),
            np.zeros(units.cols, dtype=np.int64) if groups is None else groups,
            units,
            levels,
        )

    @property
    def n_planes(self) -> int:
        """Planes of trits."""
        return int(self.trits.shape[1])

    @property
    def unit_scales(self) -> FloatMatrix:
        """The scales, one row for each unit. Shapes: → [units, planes]."""
        rows = self.scales[:1] if self.units.per == "tensor" else self.scales
        return rows.reshape(-1, self.n_planes)

    def weights(self) -> FloatMatrix:
        """Ŵ. Shapes: → [rows, cols]."""
        found: FloatMatrix = self.scales[:, self.groups, 0] * self.trits[:, 0]
        if self.n_planes == 2:
            found += self.scales[:, self.groups, 1] * self.trits[:, 1]
        return found

    def rounded(self, dtype: ScaleDtype | None, name: str) -> Grid:
        """The same with scales rounded to a dtype (float32 where none is named).

        Raises:
            ValueRangeError: a scale is too large for it.
        """
        values = self.unit_scales
        rounded = round_scales(values, dtype or "float32", name, np.arange(len(values)))
        return self._with_units(rounded)

    def _with_units(self, scales: FloatMatrix) -> Grid:
        return replace(self, scales=Grid.empty(self.units, scales).scales)


def loss(grid: Grid, target: FloatMatrix, hessian: Hessian) -> float:
    """Σ (ŵ − w) H (ŵ − w)ᵀ over the rows.

    Shapes: target [rows, cols]
    """
    error = grid.weights() - target
    return float(np.sum(error @ hessian.matrix * error))


def code_in_order(
    grid: Grid,
    target: FloatMatrix,
    hessian: Hessian,
    *,
    damping: float,
    upper: FloatMatrix | None = None,
    backend: Backend = "auto",
) -> Grid:
    """GPTQ: code the columns by falling energy, each taking up the errors of those before it.

    The order is that of coding alone: groups stay those of neighbouring columns, and their scales
    are the grid's.

    Shapes: target [rows, cols]

    Args:
        grid: the scales; its trits are not looked at.
        target: what Ŵ should be near.
        hessian: of the inputs.
        damping: what is added to H's diagonal, of its mean.
        upper: `upper_factor` of these, where it is known.
        backend: which loops; they give the same bits.

    Raises: as `upper_factor`.

    Source: arXiv 2210.17323, algorithm 1, with its activation order.
    """
    order = coding_order(hessian)
    if upper is None:
        upper = upper_factor(hessian, order, damping)
    code = _loops(target.size, backend)[0]
    work = np.ascontiguousarray(target[:, order])
    groups = grid.groups[order]
    coded = np.empty_like(grid.trits)
    for first in range(0, len(order), _BLOCK):
        last = min(first + _BLOCK, len(order))
        part = np.ascontiguousarray(work[:, first:last])
        errors = np.empty_like(part)
        trits = np.empty((*grid.trits.shape[:2], last - first), dtype=np.int8)
        inside = np.ascontiguousarray(upper[first:last, first:last])

        def run(rows: slice, args: Any = (part, inside, groups[first:last], trits, errors)) -> None:
            part, inside, of_part, trits, errors = args
            own = trits[rows], errors[rows], grid.levels
            code(part[rows], grid.scales[rows], inside, of_part, *own)

        parallel_map(run, _row_slices(len(target)))
        coded[:, :, first:last] = trits
        work[:, last:] -= errors @ upper[first:last, last:]
    trits = np.empty_like(coded)
    trits[:, :, order] = coded
    return replace(grid, trits=trits)


def coding_order(hessian: Hessian) -> NDArray[np.int64]:
    """The channels by falling energy. Shapes: → [cols]."""
    return np.argsort(-hessian.diagonal, kind="stable")


def refit_scales(grid: Grid, target: FloatMatrix, hessian: Hessian) -> Grid:
    """The scales with the least loss for the trits that there are: least squares under H.

    Where the trits leave a scale open (no weight that is not 0), it keeps its value; a negative
    scale becomes positive, and its trits change sign (of four levels it stays negative).

    Shapes: target [rows, cols]

    Memory: 16 bytes per weight, and 8·groups² bytes for each row.
    """
    rows, planes, cols = grid.trits.shape
    n_groups = grid.scales.shape[1]
    starts = np.arange(0, cols, grid.units.length) if n_groups > 1 else np.zeros(1, dtype=np.int64)
    size = planes * n_groups
    normal = np.empty((rows, size, size))
    right = np.empty((rows, size))
    wanted = target @ hessian.matrix
    for p in range(planes):
        trits = grid.trits[:, p].astype(np.float64)
        right[:, p * n_groups : (p + 1) * n_groups] = np.add.reduceat(
            wanted * trits, starts, axis=1
        )
        for g, start in enumerate(starts):
            stop = starts[g + 1] if g + 1 < n_groups else cols
            seen = trits[:, start:stop] @ hessian.matrix[start:stop]
            for q in range(planes):
                normal[:, p * n_groups + g, q * n_groups : (q + 1) * n_groups] = np.add.reduceat(
                    seen * grid.trits[:, q], starts, axis=1
                )
    old = grid.scales.transpose(0, 2, 1).reshape(rows, size)
    if grid.units.per == "tensor":
        normal, right, old = normal.sum(0, keepdims=True), right.sum(0, keepdims=True), old[:1]
    # What H hardly determines stays where it was, instead of running away.
    small = 1e-9 * np.trace(normal, axis1=1, axis2=2) / size + np.finfo(np.float64).tiny
    normal[:, np.arange(size), np.arange(size)] += small[:, None]
    found = np.linalg.solve(normal, (right + small[:, None] * old)[..., None])[..., 0]
    scales = np.broadcast_to(found, (rows, size)).reshape(rows, planes, n_groups).transpose(0, 2, 1)
    negative = (scales < 0) & (grid.levels == 3)
    scales = np.ascontiguousarray(np.where(negative, -scales, scales))
    signs = np.where(negative, np.int8(-1), np.int8(1)).transpose(0, 2, 1)[:, :, grid.groups]
    better = replace(grid, trits=grid.trits * signs, scales=scales)
    # Of a nearly singular system the solution can be worse than the start.
    return better if loss(better, target, hessian) <= loss(grid, target, hessian) else grid


def improve_trits(
    grid: Grid, target: FloatMatrix, hessian: Hessian, *, backend: Backend = "auto"
) -> tuple[Grid, int]:
    """Coordinate descent: each weight to its best level, others fixed, until nothing helps.

    Every change lowers the loss, so it ends; at the latest after 50 sweeps.

    Shapes: target [rows, cols]

    Returns:
        The grid, and how many changes were made.
    """
    sweep = _loops(target.size, backend)[1]
    trits = grid.trits.copy()
    error = grid.weights() - target
    slope = error @ hessian.matrix
    left = np.sum(slope * error, axis=1)
    energy = np.sum((target @ hessian.matrix) * target, axis=1)
    least = _NOTHING * np.maximum(energy, np.finfo(np.float64).tiny)

    def descend(rows: slice) -> int:
        own = (
            *(trits[rows], grid.scales[rows], grid.groups, slope[rows]),
            *(hessian.matrix, least[rows], grid.levels),
        )
        total, remaining = 0, float(np.sum(left[rows]))
        for _ in range(_SWEEPS):
            changed, gained = sweep(*own)
            total, remaining = total + int(changed), remaining - gained
            if changed == 0 or gained <= _CONVERGED * max(remaining, 0.0):
                break
        return total

    changes = sum(parallel_map(descend, _row_slices(len(target))))
    return replace(grid, trits=trits), changes


def _row_slices(rows: int) -> list[slice]:
    return [slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]


def _loops(n_weights: int, backend: Backend) -> tuple[Callable[..., Any], Callable[..., Any]]:
    wanted = backend == "compiled" or (backend == "auto" and n_weights >= _WORTH_COMPILING)
    compiled = _compiled() if wanted and numba_is_here() else None
    return compiled or (numpy_kernels.code_columns, numpy_kernels.sweep)


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    try:
        numba = importlib.import_module("numba")
    except ImportError:  # there, but not for this NumPy or Python
        return None
    loops = (numba_kernels.code_columns, numba_kernels.sweep)
    try:
        first, second = (numba.njit(loop, nogil=True, cache=True) for loop in loops)
    except RuntimeError:  # numba finds no directory that it may write its cache to
        first, second = (numba.njit(loop, nogil=True) for loop in loops)
    return first, second
