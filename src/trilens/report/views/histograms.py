"""Weights of the matrices that lost most, by size and by the level that each became."""

from __future__ import annotations

from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.report.page import Chart, Section
from trilens.report.tables import Column, Table
from trilens.ternary.histogram import BINS, REACH, LevelHistogram

__all__ = ["histogram_section"]

_MOST = 6
_MINUS = "−"


def histogram_section(report: TernaryReport) -> Section | None:
    """A histogram for each of the worst matrices; None where no weights were seen."""
    seen = [tensor for tensor in report.coded if tensor.histogram is not None]
    worst = sorted(seen, key=_error, reverse=True)[:_MOST]
    if not worst:
        return None
    charts = tuple(_chart(tensor, tensor.histogram) for tensor in worst if tensor.histogram)
    which = f"The {len(charts)} of {len(seen)} matrices" if len(seen) > len(charts) else "Matrices"
    words = (
        f"{which} with the largest error; each weight is divided by the scale of its unit and "
        "coloured by what it became. Lines are thresholds: where one level gives way to the next. "
        f"What lies beyond {REACH} scales stands in the outermost bins.",
    )
    return Section("Weights by level", charts, words, name="histograms")


def _error(tensor: TensorReport) -> float:
    """What it is ranked by: at the outputs, where a calibration measured that."""
    errors = (tensor.output_error_held_out, tensor.output_error, tensor.relative_error)
    return next((error for error in errors if error is not None), 0.0)


def _chart(tensor: TensorReport, found: LevelHistogram) -> Chart:
    names = [_level(level) for level in found.levels]
    columns = (
        Column("from", unit="scales", spell="{:g}".format),
        Column("to", unit="scales", spell="{:g}".format),
        *(Column(name, note="weights that became this level") for name in names),
    )
    width = 2 * REACH / BINS
    rows = tuple(
        (i * width - REACH, (i + 1) * width - REACH, *counts)
        for i, counts in enumerate(zip(*found.counts, strict=True))
    )
    marks = tuple(mark for mark in found.thresholds if mark is not None)
    low, median, high = found.scale
    scale = f"scale {median:.4g}" + (f" ({low:.4g} … {high:.4g})" if low < high else "")
    at = ", ".join(f"{mark:.2f}".replace("-", _MINUS) for mark in marks)
    return Chart(
        kind="histogram",
        table=Table(columns, rows, title=tensor.name, keys=2),
        x="from",
        until="to",
        y=tuple(column.name for column in columns[2:]),
        marks=marks,
        words=f"{scale}; thresholds at {at or 'none'} scales; {found.n_weights:,} weights, error "
        f"{_error(tensor):.4f}",
    )


def _level(level: int) -> str:
    return {-1: f"{_MINUS}1", 0: "0"}.get(level, f"+{level}")
