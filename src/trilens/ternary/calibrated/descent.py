"""Trits and scales under a Hessian: coded column by column, then improved until nothing helps.

`Grid` holds what is being worked on; every function here takes it and a target W, and lowers (or
at least does not raise) Σ (ŵ − w) H (ŵ − w)ᵀ over the rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from trilens.ternary.calibrated import numba_kernels, numpy_kernels, torch_kernels
from trilens.ternary.calibrated.hessian import Hessian, upper_factor, wide
from trilens.ternary.granularity import Units
from trilens.ternary.rules.coder import ScaleDtype, round_scales
from trilens.ternary.rules.kernels import numba_is_here, parallel_map

__all__ = [
    "Backend",
    "Grid",
    "code_in_order",
    "coding_order",
    "improve_trits",
    "loss",
    "refit_scales",
]


Backend: TypeAlias = Literal["auto", "numpy", "compiled", "torch"]
"""Which loops: torch's run on any device, the others on the processor, and give the same bits."""

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

    trits: Tensor
    scales: Tensor
    groups: Tensor
    units: Units
    levels: int = 3

    @classmethod
    def empty(
        cls, units: Units, scales: Any, *, levels: int = 3, device: torch.device | None = None
    ) -> Grid:
        """Scales without trits yet.

        Shapes: scales [units, planes]
        """
        values = wide(scales, device)
        planes = values.shape[1]
        per_row = values.reshape(-1, units.per_row, planes).expand(units.rows, -1, -1)
        columns = torch.arange(units.cols, device=values.device)
        return cls(
            torch.zeros(units.rows, planes, units.cols, dtype=torch.int8, device=values.device),
            per_row.contiguous(),
            columns // units.length if units.per == "group" else torch.zeros_like(columns),
            units,
            levels,
        )

    @property
    def n_planes(self) -> int:
        """Planes of trits."""
        return int(self.trits.shape[1])

    @property
    def unit_scales(self) -> Tensor:
        """The scales, one row for each unit. Shapes: → [units, planes]."""
        rows = self.scales[:1] if self.units.per == "tensor" else self.scales
        return rows.reshape(-1, self.n_planes)

    def weights(self) -> Tensor:
        """Ŵ. Shapes: → float64 [rows, cols]."""
        found = self.scales[:, self.groups, 0] * self.trits[:, 0]
        if self.n_planes == 2:
            found += self.scales[:, self.groups, 1] * self.trits[:, 1]
        return found

    def rounded(self, dtype: ScaleDtype | None, name: str) -> Grid:
        """The same with scales rounded to a dtype (float32 where none is named).

        Raises:
            ValueRangeError: a scale is too large for it.
        """
        values = self.unit_scales.cpu().numpy()
        rounded = round_scales(values, dtype or "float32", name, np.arange(len(values)))
        made = Grid.empty(self.units, rounded, device=self.scales.device)
        return replace(self, scales=made.scales)


def loss(grid: Grid, target: Tensor, hessian: Hessian) -> float:
    """Σ (ŵ − w) H (ŵ − w)ᵀ over the rows.

    Shapes: target [rows, cols]
    """
    error = grid.weights() - target
    return float((error @ hessian.matrix * error).sum())


def code_in_order(
    grid: Grid,
    target: Tensor,
    hessian: Hessian,
    *,
    damping: float,
    upper: Tensor | None = None,
    backend: Backend = "auto",
) -> Grid:
    """GPTQ: code the columns by falling energy, each taking up the errors of those before it.

    The order is that of coding alone: groups stay those of neighbouring columns, and their scales
    are the grid's.

    Shapes: target float64 [rows, cols]

    Args:
        grid: the scales; its trits are not looked at.
        target: what Ŵ should be near.
        hessian: of the inputs.
        damping: what is added to H's diagonal, of its mean.
        upper: `upper_factor` of these, where it is known.
        backend: which loops.

    Raises: as `upper_factor`.

    Source: arXiv 2210.17323, algorithm 1, with its activation order.
    """
    order = coding_order(hessian)
    if upper is None:
        upper = upper_factor(hessian, order, damping)
    code = _loops(target, backend)[0]
    work = target[:, order].contiguous()
    groups = grid.groups[order]
    coded = torch.empty_like(grid.trits)
    for first in range(0, len(order), _BLOCK):
        last = min(first + _BLOCK, len(order))
        part = work[:, first:last].contiguous()
        errors = torch.empty_like(part)
        trits = torch.empty_like(grid.trits[:, :, first:last]).contiguous()
        inside = upper[first:last, first:last].contiguous()
        code(part, grid.scales, inside, groups[first:last], trits, errors, grid.levels)
        coded[:, :, first:last] = trits
        work[:, last:] -= errors @ upper[first:last, last:]
    trits = torch.empty_like(coded)
    trits[:, :, order] = coded
    return replace(grid, trits=trits)


def coding_order(hessian: Hessian) -> Tensor:
    """The channels by falling energy. Shapes: → [cols]."""
    return torch.argsort(-hessian.diagonal, stable=True)


def refit_scales(grid: Grid, target: Tensor, hessian: Hessian) -> Grid:
    """The scales with the least loss for the trits that there are: least squares under H.

    Where the trits leave a scale open (no weight that is not 0), it keeps its value; a negative
    scale becomes positive, and its trits change sign (of four levels it stays negative).

    Shapes: target float64 [rows, cols]

    Memory: 16 bytes per weight, and 8·groups² bytes for each row.
    """
    rows, planes, cols = grid.trits.shape
    n_groups = grid.scales.shape[1]
    length = grid.units.length if n_groups > 1 else cols
    size = planes * n_groups
    normal = target.new_empty(rows, size, size)
    right = target.new_empty(rows, size)
    wanted = target @ hessian.matrix
    for p in range(planes):
        trits = grid.trits[:, p].double()
        right[:, p * n_groups : (p + 1) * n_groups] = _group_sums(wanted * trits, length)
        for g in range(n_groups):
            own = slice(g * length, min((g + 1) * length, cols))
            seen = trits[:, own] @ hessian.matrix[own]
            for q in range(planes):
                normal[:, p * n_groups + g, q * n_groups : (q + 1) * n_groups] = _group_sums(
                    seen * grid.trits[:, q], length
                )
    old = grid.scales.transpose(1, 2).reshape(rows, size)
    if grid.units.per == "tensor":
        normal, right, old = normal.sum(0, keepdim=True), right.sum(0, keepdim=True), old[:1]
    # What H hardly determines stays where it was, instead of running away.
    diagonal = normal.diagonal(dim1=1, dim2=2)
    small = 1e-9 * diagonal.sum(1) / size + torch.finfo(torch.float64).tiny
    diagonal += small[:, None]
    found = torch.linalg.solve(normal, (right + small[:, None] * old)[..., None])[..., 0]
    scales = found.expand(rows, size).reshape(rows, planes, n_groups).transpose(1, 2)
    negative = (scales < 0) & (grid.levels == 3)
    scales = torch.where(negative, -scales, scales).contiguous()
    signs = (1 - 2 * negative.to(torch.int8)).transpose(1, 2)[:, :, grid.groups]
    better = replace(grid, trits=grid.trits * signs, scales=scales)
    # Of a nearly singular system the solution can be worse than the start.
    return better if loss(better, target, hessian) <= loss(grid, target, hessian) else grid


def improve_trits(
    grid: Grid, target: Tensor, hessian: Hessian, *, backend: Backend = "auto"
) -> tuple[Grid, int]:
    """Coordinate descent: each weight to its best level, others fixed, until nothing helps.

    Every change lowers the loss, so it ends; at the latest after 50 sweeps.

    Shapes: target float64 [rows, cols]

    Returns:
        The grid, and how many changes were made.
    """
    sweep = _loops(target, backend)[1]
    trits = grid.trits.clone()
    error = grid.weights() - target
    slope = error @ hessian.matrix
    left = (slope * error).sum(1)
    energy = (target @ hessian.matrix * target).sum(1)
    least = _NOTHING * energy.clamp_min(torch.finfo(torch.float64).tiny)
    changes = sweep(
        left, (trits, grid.scales, grid.groups, slope, hessian.matrix, least, grid.levels)
    )
    return replace(grid, trits=trits), changes


def _group_sums(values: Tensor, length: int) -> Tensor:
    """Shapes: [rows, cols] → [rows, groups]."""
    missing = -values.shape[1] % length
    padded = pad(values, (0, missing)) if missing else values
    return padded.reshape(len(values), -1, length).sum(2)


def _row_slices(rows: int) -> list[slice]:
    return [slice(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]


def _loops(like: Tensor, backend: Backend) -> tuple[Callable[..., None], Callable[..., int]]:
    """How columns are coded and trits improved, for tensors like this one."""
    if backend == "torch" or like.device.type != "cpu":
        return torch_kernels.code_columns, partial(_descend, torch_kernels.sweep)
    wanted = backend == "compiled" or (backend == "auto" and like.numel() >= _WORTH_COMPILING)
    compiled = _compiled() if wanted and numba_is_here() else None
    code, sweep = compiled or (numpy_kernels.code_columns, numpy_kernels.sweep)

    def code_rows(work: Tensor, scales: Tensor, *rest: Any) -> None:
        upper, groups, trits, errors, levels = (_array(each) for each in rest)
        rows_of = work.numpy(), scales.numpy()

        def run(rows: slice) -> None:
            part, own = (each[rows] for each in rows_of)
            code(part, own, upper, groups, trits[rows], errors[rows], levels)

        parallel_map(run, _row_slices(len(work)))

    def descend_rows(left: Tensor, given: tuple[Any, ...]) -> int:
        trits, scales, groups, slope, hessian, least, levels = map(_array, given)
        remaining = left.numpy()

        def run(rows: slice) -> int:
            own = (trits[rows], scales[rows], groups, slope[rows], hessian, least[rows], levels)
            return _descend(sweep, remaining[rows], own)

        return sum(parallel_map(run, _row_slices(len(left))))

    return code_rows, descend_rows


def _descend(sweep: Callable[..., Any], left: Any, given: tuple[Any, ...]) -> int:
    """Sweep until nothing helps; how many changes were made. `left`: the loss of each row."""
    total, remaining = 0, float(left.sum())
    for _ in range(_SWEEPS):
        changed, gained = sweep(*given)
        total, remaining = total + int(changed), remaining - gained
        if changed == 0 or gained <= _CONVERGED * max(remaining, 0.0):
            break
    return total


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


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
