"""Units in, trits and rounded scales out: the one way that every rule takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from trilens.errors import UsageError, ValueRangeError
from trilens.ternary.granularity import Span, Units
from trilens.ternary.rules.fits import Fit, keep_ternary
from trilens.ternary.rules.kernels import Backend, Kernels, kernels_for, parallel_map
from trilens.ternary.rules.rules import Rule
from trilens.ternary.rules.unit_scan import UnitScan, inner_cuts
from trilens.ternary.weights_view import BLOCK, WeightsView

__all__ = ["Coded", "ScaleDtype", "code_units", "lost_scales_error", "round_scales"]

ScaleDtype: TypeAlias = Literal["float16", "bfloat16", "float32"]

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}

_TERNARY = np.array([-1, 0, 1], dtype=np.int8)  # the usual table of one plane


@dataclass(frozen=True, slots=True)
class Coded:
    """What `code_units` found.

    Shapes: planes 1 or 2

    Attributes:
        trits: [planes, size] int8.
        scales: [units, planes], every value one of the scale dtype (float64 where none is asked).
        offsets: [units] likewise, or None.
        was_ternary: Whether every unit was ternary as it came in.
        zeroed_units: Units that are not zero, but whose scale is 0 in the scale dtype.
    """

    trits: NDArray[np.int8]
    scales: NDArray[np.float64]
    offsets: NDArray[np.float64] | None
    was_ternary: bool
    zeroed_units: int


@dataclass(frozen=True, slots=True)
class _Job:
    """All that coding a span needs to know, and where its results go."""

    view: WeightsView
    units: Units
    rule: Rule
    scale_dtype: ScaleDtype | None
    kernels: Kernels
    trits: NDArray[np.int8]  # [planes, size]
    scales: NDArray[np.float64]  # [units, planes]
    offsets: NDArray[np.float64] | None  # [units]


def code_units(
    view: WeightsView,
    units: Units,
    rule: Rule,
    *,
    scale_dtype: ScaleDtype | None = None,
    n_planes: int = 1,
    has_offset: bool = False,
    backend: Backend = "auto",
) -> Coded:
    """Code every unit by a rule.

    Args:
        view: The weights.
        units: What shares a scale.
        rule: From units to their fit.
        scale_dtype: What scales and offsets are rounded to; None does not round.
        n_planes: Planes of trits the rule makes.
        has_offset: Whether the rule gives offsets.
        backend: Which kernels; they give the same bits.

    Raises:
        NonFiniteError: a weight is NaN or Inf.
        ValueRangeError: a scale is too large for its dtype, or every scale is too small.
        UsageError: an unknown `scale_dtype`.

    Memory: the trits (1 byte per weight and plane), and per thread a block of 2²⁰ weights with at
    most 50 bytes each; the rules that look for the exact optimum need more for units beyond 2²⁰
    weights, see `exact.best_survivors`.
    """
    if scale_dtype is not None and scale_dtype not in get_args(ScaleDtype):
        names = ", ".join(repr(name) for name in get_args(ScaleDtype))
        raise UsageError(f"scale dtype {scale_dtype!r} is unknown: pass {names} or None")
    job = _Job(
        view,
        units,
        rule,
        scale_dtype,
        kernels_for(view.size, backend),
        np.empty((n_planes, view.size), dtype=np.int8),
        np.empty((units.count, n_planes)),
        np.empty(units.count) if has_offset else None,
    )
    spans = list(units.spans())
    if units.are_long:
        found = [_code_span(job, span) for span in spans]  # parallel inside
    else:
        found = parallel_map(lambda span: _code_span(job, span), spans)
    zeroed = sum(span_zeroed for _, span_zeroed in found)
    if zeroed and not job.scales.any():
        raise lost_scales_error(view.name, scale_dtype)
    return Coded(job.trits, job.scales, job.offsets, all(kept for kept, _ in found), zeroed)


def _code_span(job: _Job, span: Span) -> tuple[bool, int]:
    """Whether all units of the span were ternary, and how many were lost to rounding."""
    size = span.stop - span.start
    if job.units.are_long:
        bounds = [(a, min(a + BLOCK, span.stop)) for a in range(span.start, span.stop, BLOCK)]
        scan = UnitScan(
            1, size, len(bounds), lambda i: job.view.stored(*bounds[i])[None], job.kernels
        )
        fit, kept = _fit(job, scan)
        fit, zeroed = _store(job, fit, np.array([span.first_unit]))

        def write(i: int) -> None:
            start, stop = bounds[i]
            _write(job, fit, scan.stored(i), job.trits[:, None, start:stop])

        parallel_map(write, range(len(bounds)))
        return kept, zeroed
    return _code_short(job, span)


def _code_short(job: _Job, span: Span) -> tuple[bool, int]:
    rows = job.view.stored(span.start, span.stop).reshape(span.n_rows, -1)
    out = job.trits[:, span.start : span.stop].reshape(len(job.trits), span.n_rows, -1)
    width, length = rows.shape[1], job.units.length
    whole = width // length * length
    per_row = -(-width // length)
    numbers = span.first_unit + np.arange(span.n_rows * per_row).reshape(span.n_rows, per_row)
    kept, zeroed = True, 0
    for begin, end, unit_length in ((0, whole, length), (whole, width, width - whole)):
        if begin == end:
            continue
        x = np.ascontiguousarray(rows[:, begin:end]).reshape(-1, unit_length)
        scan = UnitScan(len(x), unit_length, 1, lambda _, x=x: x, job.kernels)  # type: ignore[misc]
        fit, part_kept = _fit(job, scan)
        columns = slice(begin // length, -(-end // length))
        fit, part_zeroed = _store(job, fit, numbers[:, columns].reshape(-1))
        part = out[:, :, begin:end]
        if begin == 0 and end == width:
            _write(job, fit, x, part.reshape(len(part), -1, unit_length))
        else:
            coded = np.empty((len(part), *x.shape), dtype=np.int8)
            _write(job, fit, x, coded)
            part[:] = coded.reshape(part.shape)
        kept, zeroed = kept and part_kept, zeroed + part_zeroed
    return kept, zeroed


def _fit(job: _Job, scan: UnitScan) -> tuple[Fit, bool]:
    magnitudes = scan.ternary_magnitudes()
    all_ternary = bool(np.all(magnitudes >= 0))
    if all_ternary:
        return keep_ternary(_empty_fit(job, scan.n_units), magnitudes), True
    abs_sums = scan.abs_sums()
    if not np.all(np.isfinite(abs_sums)):
        raise job.view.sum_error()
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32: `_store` refuses
        return keep_ternary(job.rule(scan, abs_sums), magnitudes), False


def _empty_fit(job: _Job, n_units: int) -> Fit:
    n_planes = len(job.trits)
    n_cells = 3**n_planes
    return Fit(
        np.zeros((n_units, n_cells - 1)),
        np.zeros((n_units, n_planes)),
        None if job.offsets is None else np.zeros(n_units),
        np.zeros((n_units, n_planes, n_cells), dtype=np.int8),
    )


def _store(job: _Job, fit: Fit, numbers: NDArray[np.int64]) -> tuple[Fit, int]:
    """Round and keep the scales; units whose scale rounds to 0 get zeros only."""
    scales = round_scales(fit.scales, job.scale_dtype, job.view.name, numbers)
    lost = (fit.scales[:, 0] != 0) & (scales[:, 0].astype(np.float32) == 0)
    scales[lost] = 0.0
    job.scales[numbers] = scales
    if job.offsets is not None and fit.offsets is not None:
        job.offsets[numbers] = round_scales(fit.offsets, job.scale_dtype, job.view.name, numbers)
    if not lost.any():
        return fit, 0
    tables = np.where(lost[:, None, None], np.int8(0), fit.tables)
    return Fit(fit.cuts, scales, fit.offsets, tables), int(np.count_nonzero(lost))


def _write(job: _Job, fit: Fit, x: NDArray[Any], out: NDArray[np.int8]) -> None:
    """Shapes: x [units, length], stored; out [planes, units, length]"""
    cuts = inner_cuts(fit.cuts, job.view.dtype)
    is_plain = fit.tables.shape[1:] == (1, 3) and bool(np.all(fit.tables == _TERNARY))
    if is_plain and out[0].flags.c_contiguous:
        job.kernels.codes(x, cuts, out[0])
        return
    cells = np.empty(x.shape, dtype=np.int8)
    job.kernels.codes(x, cuts, cells)
    middle = fit.cuts.shape[1] // 2
    for plane in range(len(out)):
        table = fit.tables[:, plane]
        if table.shape[1] == 3 and np.all(table == _TERNARY):
            out[plane] = cells
        else:
            out[plane] = np.take_along_axis(table, cells.astype(np.intp) + middle, axis=1)


def lost_scales_error(name: str, dtype: ScaleDtype | None) -> ValueRangeError:
    """The error for weights of which nothing is left in the scales' dtype."""
    return ValueRangeError(
        f"scales of weights {name!r} are all below the smallest {dtype or 'float32'}: nothing "
        "would be left of the weights; take a wider scale dtype or scale them up"
    )


def round_scales(
    scales: NDArray[np.float64],
    dtype: ScaleDtype | None,
    name: str,
    numbers: NDArray[np.int64],
) -> NDArray[np.float64]:
    """The nearest values of a dtype, in float64; None checks that float32 can hold them.

    Shapes: scales [units, …], numbers [units], what errors call them

    Raises:
        ValueRangeError: a scale is too large for the dtype.
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype == "float16":
            rounded: NDArray[Any] = scales.astype(np.float16)
        elif dtype == "bfloat16":
            rounded = (
                torch.from_numpy(np.ascontiguousarray(scales))
                .to(torch.bfloat16)
                .to(torch.float64)
                .numpy()
            )
        else:
            rounded = scales.astype(np.float32)
    too_large = np.argwhere(~np.isfinite(rounded))
    if too_large.size:
        unit = int(numbers[too_large[0, 0]])
        value, wanted = float(scales[tuple(too_large[0])]), dtype or "float32"
        raise ValueRangeError(
            f"scale {value:g} of unit {unit} of weights {name!r} is beyond {wanted}, which ends at "
            f"{_LARGEST[wanted]:g}: take a wider scale dtype or scale the weights down"
        )
    return scales.copy() if dtype is None else rounded.astype(np.float64)
