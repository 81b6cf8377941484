"""One function for each kind of chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from trilens.report.colours import INK, SERIES
from trilens.report.page import Chart
from trilens.report.plots.style import PaperFigure, heading, new_figure, plain, ramp
from trilens.report.tables import Column

__all__ = ["chart_figure", "label_ticks"]

_BARS = 120
_VECTOR_CELLS = 4096
_CHARACTERS_PER_INCH = 11
_MARGIN = 1.8
_MARKERS = "os^D"
_HATCHES = (None, "//", "..", "xx")


def chart_figure(chart: Chart) -> PaperFigure:
    """The chart as a figure."""
    draw = {
        "lines": _lines,
        "bars": _bars,
        "heatmap": _heatmap,
        "scatter": _scatter,
        "histogram": _histogram,
    }[chart.kind]
    figure, axes = draw(chart)
    axes.set_title(plain(chart.title or chart.table.title, 90))
    return figure


def label_ticks(axes: Axes, which: str, names: Sequence[object], most: int) -> None:
    """Names at 0, 1, 2 …; of many, every so many-th."""
    every = max(1, math.ceil(len(names) / most))
    at = range(0, len(names), every)
    shown = [plain(names[i]) for i in at]
    if which == "x":
        figure = axes.get_figure(root=True)
        room = _CHARACTERS_PER_INCH * (figure.get_figwidth() - _MARGIN) if figure else 0
        turned = sum(len(each) + 2 for each in shown) > room
        axes.set_xticks(list(at), shown, rotation=90 if turned else 0)
    else:
        axes.set_yticks(list(at), shown)


def _column(chart: Chart, name: str) -> tuple[Column, list[Any]]:
    at = [column.name for column in chart.table.columns].index(name)
    return chart.table.columns[at], [row[at] for row in chart.table.values()]


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values], float)


def _lines(chart: Chart) -> tuple[PaperFigure, Axes]:
    figure, axes = new_figure(5.2, 3.0)
    column, xs = _column(chart, chart.x)
    columns = [_column(chart, name) for name in chart.y]
    for i, (each, values) in enumerate(columns):
        axes.plot(
            _numbers(xs),
            _numbers(values),
            color=SERIES[i % len(SERIES)],
            linestyle="--" if i % 2 else "-",
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4,
            label=heading(each),
        )
    axes.set_xlabel(heading(column))
    if len(columns) > 1:
        axes.legend()
    else:
        axes.set_ylabel(heading(columns[0][0]))
    if chart.log:
        axes.set_yscale("log")
    if all(isinstance(x, int) for x in xs):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _bars(chart: Chart) -> tuple[PaperFigure, Axes]:
    column, names = _column(chart, chart.x)
    value, values = _column(chart, chart.y[0])
    names, lengths = names[:_BARS], np.nan_to_num(_numbers(values[:_BARS]))
    figure, axes = new_figure(5.2, 0.9 + 0.2 * max(len(names), 3))
    colours = [SERIES[1] if length < 0 else SERIES[0] for length in lengths]
    axes.barh(range(len(names)), lengths, 0.7, color=colours)
    label_ticks(axes, "y", names, _BARS)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="#59636e", linewidth=0.8)
    axes.set_xlabel(heading(value))
    more = f", the first {_BARS} of {len(values):,}" if len(values) > _BARS else ""
    axes.set_ylabel(heading(column) + more)
    return figure, axes


def _sorted(values: Sequence[Any]) -> list[Any]:
    found = [*dict.fromkeys(values)]
    return sorted(found) if all(isinstance(each, int | float) for each in found) else found


def _heatmap(chart: Chart) -> tuple[PaperFigure, Axes]:
    (across_column, xs), (down_column, rows) = _column(chart, chart.x), _column(chart, chart.row)
    value, values = _column(chart, chart.y[0])
    across, down = _sorted(xs), _sorted(rows)
    grid = np.full((len(down), len(across)), np.nan)
    for x, row, number in zip(xs, rows, _numbers(values), strict=True):
        grid[down.index(row), across.index(x)] = number
    figure, axes = new_figure(
        min(8.0, 2.2 + 0.28 * len(across)), min(9.0, max(1.9, 1.2 + 0.24 * len(down)))
    )
    low, high = _limits(chart, grid)
    mesh = axes.pcolormesh(
        np.arange(len(across) + 1) - 0.5,
        np.arange(len(down) + 1) - 0.5,
        np.ma.masked_invalid(grid),
        cmap=ramp(diverging=chart.diverging),
        vmin=low,
        vmax=high,
        rasterized=grid.size > _VECTOR_CELLS,
    )
    figure.colorbar(mesh, ax=axes, label=heading(value))
    names: list[Any] = across
    if chart.label:
        words = dict(zip(xs, _column(chart, chart.label)[1], strict=True))
        names = [f"{x} {words[x]}" for x in across]
    label_ticks(axes, "x", names, 40)
    label_ticks(axes, "y", down, 40)
    axes.set_xlabel(heading(across_column))
    axes.set_ylabel(heading(down_column))
    return figure, axes


def _limits(chart: Chart, grid: NDArray[np.float64]) -> tuple[float, float]:
    """As the page's: from 0, unless all values lie far from it and close together."""
    there = grid[np.isfinite(grid)]
    if not there.size:
        return 0.0, 1.0
    largest = float(np.abs(there).max()) or 1.0
    if chart.diverging:
        return -largest, largest
    if chart.scale is not None:
        return chart.scale
    low, high = float(there.min()), float(there.max())
    if low > 0.5 * high and high > low:
        return low, high
    return (low - 1, high + 1) if low == high else (min(0.0, low), max(0.0, high))


def _scatter(chart: Chart) -> tuple[PaperFigure, Axes]:
    figure, axes = new_figure(4.6, 3.4)
    (across, xs), (up, ys) = _column(chart, chart.x), _column(chart, chart.y[0])
    axes.scatter(_numbers(xs), _numbers(ys), s=28, color=SERIES[0], alpha=0.55, linewidths=0)
    axes.set_xlabel(heading(across))
    axes.set_ylabel(heading(up))
    return figure, axes


def _histogram(chart: Chart) -> tuple[PaperFigure, Axes]:
    figure, axes = new_figure(4.6, 3.0)
    (column, left), (_, right) = _column(chart, chart.x), _column(chart, chart.until)
    parts = [_column(chart, name) for name in chart.y]
    edges = [*left, right[-1]]
    floor = np.zeros(len(left))
    for i, (each, counts) in enumerate(parts):
        top = floor + np.nan_to_num(_numbers(counts))
        axes.stairs(
            top, edges, baseline=floor, fill=True, color=SERIES[i % len(SERIES)],
            hatch=_HATCHES[i % len(_HATCHES)], edgecolor="white", label=heading(each),
        )  # fmt: skip
        floor = top
    for mark in chart.marks:
        axes.axvline(mark, color=INK, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.08 * float(floor.max(initial=0)) or 1.0)
    if len(parts) > 1:
        axes.legend()
    else:
        axes.set_ylabel(heading(parts[0][0]))
    unit = f" ({column.unit})" if column.unit else ""
    axes.set_xlabel(plain(chart.title or chart.table.title, 80) + unit)
    return figure, axes
