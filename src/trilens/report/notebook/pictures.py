"""Pictures without a script and without a library: PNG of pixels, SVG of lines and bars."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray

from trilens.printable import escaped
from trilens.report.colours import BLUES, ORANGES, SERIES
from trilens.report.mosaic import mosaic
from trilens.report.page import Chart
from trilens.report.patterns import HeadPatterns
from trilens.report.words import four_digits

__all__ = ["chart_picture", "mosaic_picture", "png"]

Pixels = NDArray[np.uint8]

_MOSAIC_SIDE = 720  # pixels of its longer side
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 200, 52, 34
_BARS = 24


def _ramp(colours: Sequence[str]) -> NDArray[np.uint8]:
    parts = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], float)
    at = np.linspace(0, len(colours) - 1, 128)
    mixed = [np.interp(at, range(len(colours)), parts[:, i]) for i in range(3)]
    found: Pixels = np.rint(np.stack(mixed, 1)).astype(np.uint8)
    return found


_PALETTE = np.concatenate([_ramp(ORANGES)[::-1][:127], _ramp(BLUES), np.full((1, 3), 216)])


def png(codes: Pixels) -> bytes:
    """A picture of palette numbers [height, width]: 0 … 126 below zero, 127 zero, 255 grey."""
    height, width = codes.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = codes
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    palette = _PALETTE.astype(np.uint8).tobytes()
    body = zlib.compress(rows.tobytes(), 9)
    parts = [(b"IHDR", head), (b"PLTE", palette), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def _coded(shares: NDArray[np.float32]) -> Pixels:
    """Shares in [−1, 1] → palette numbers; NaN is grey."""
    found: Pixels = np.rint(127 + np.nan_to_num(shares).clip(-1, 1) * 127).astype(np.uint8)
    found[np.isnan(shares)] = 255
    return found


def _image(codes: Pixels, words: str, width: int) -> str:
    data = base64.b64encode(png(codes)).decode("ascii")
    return (
        f'<img alt="{escape(escaped(words))}" src="data:image/png;base64,{data}" '
        f'style="width:{width}px;max-width:100%;image-rendering:pixelated;display:block">'
    )


def mosaic_picture(patterns: HeadPatterns) -> str:
    """All heads, a row per layer."""
    grid, _ = mosaic(patterns, _MOSAIC_SIDE)
    words = f"attention patterns: a row for each of {len(patterns.layers)} layers, a tile per head"
    width = min(_MOSAIC_SIDE, max(grid.shape[1], 90 * max(patterns.heads)))
    return _image(_coded(grid), words, width)


def chart_picture(chart: Chart) -> str:
    """A chart: pixels for a heatmap, else SVG."""
    draw = {
        "bars": _bars,
        "heatmap": _heatmap,
        "histogram": _histogram,
        "lines": _lines,
        "scatter": _scatter,
    }[chart.kind]
    return draw(chart)


def _column(chart: Chart, name: str) -> list[object]:
    at = [column.name for column in chart.table.columns].index(name)
    return [row[at] for row in chart.table.values()]


def _title(chart: Chart, name: str) -> str:
    column = next(each for each in chart.table.columns if each.name == name)
    return f"{column.title} ({column.unit})" if column.unit else column.title


def _numbers(chart: Chart, name: str) -> NDArray[np.float64]:
    return np.array([math.nan if v is None else v for v in _column(chart, name)], float)


def _heatmap(chart: Chart) -> str:
    xs, rows = _column(chart, chart.x), _column(chart, chart.row)
    across, down = [*dict.fromkeys(xs)], [*dict.fromkeys(rows)]
    grid = np.full((len(down), len(across)), np.nan, np.float32)
    for x, row, value in zip(xs, rows, _numbers(chart, chart.y[0]), strict=True):
        grid[len(down) - 1 - down.index(row), across.index(x)] = value
    largest = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
    words = f"{chart.title or chart.table.title}: {_title(chart, chart.row)} over "
    words += f"{_title(chart, chart.x)}, largest {four_digits(largest)}"
    picture = _image(_coded(grid / (largest or 1)), words, min(560, 28 * len(across) + 60))
    height = f"height:{min(320, 18 * len(down) + 20)}px;"
    return picture.replace('style="', f'style="{height}')


def _frame(inner: str, words: str, low: float, high: float, left: str, right: str) -> str:
    """An SVG with its two axes named by their ends."""
    text = 'font-family="sans-serif" font-size="11" fill="currentColor"'
    top, base = 8, _HEIGHT - _BOTTOM
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'style="max-width:100%;display:block"><title>{escape(escaped(words))}</title>'
        f'<path d="M{_LEFT} {top}V{base}H{_WIDTH - 8}" fill="none" stroke="currentColor" '
        f'stroke-opacity=".4"/>{inner}'
        f'<text x="{_LEFT - 6}" y="{top + 8}" text-anchor="end" {text}>{four_digits(high)}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end" {text}>{four_digits(low)}</text>'
        f'<text x="{_LEFT}" y="{base + 16}" {text}>{escape(escaped(left))}</text>'
        f'<text x="{_WIDTH - 8}" y="{base + 16}" text-anchor="end" {text}>'
        f"{escape(escaped(right))}</text></svg>"
    )


def _spread(values: NDArray[np.float64]) -> tuple[float, float]:
    there = values[np.isfinite(values)]
    if not there.size:
        return 0.0, 1.0
    low, high = float(there.min()), float(there.max())
    return (low, high) if high > low else (low - 1, high + 1)


def _places(xs: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    found: NDArray[np.float64] = _LEFT + 6 + (xs - low) / (high - low) * (_WIDTH - _LEFT - 20)
    return found


def _heights(ys: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    base = _HEIGHT - _BOTTOM
    found: NDArray[np.float64] = base - (ys - low) / (high - low) * (base - 14)
    return found


def _lines(chart: Chart) -> str:
    xs = _numbers(chart, chart.x)
    all_ys = [_numbers(chart, name) for name in chart.y]
    (left, right), (low, high) = _spread(xs), _spread(np.concatenate(all_ys))
    parts = []
    for number, ys in enumerate(all_ys):
        colour = SERIES[number % len(SERIES)]
        places = zip(_places(xs, left, right), _heights(ys, low, high), strict=True)
        points = [(x, y) for x, y in places if math.isfinite(y)]
        if len(points) == 1:  # a line of one point is none
            x, y = points[0]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            continue
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
    words = f"{chart.title or chart.table.title} over {_title(chart, chart.x)}"
    ends = (f"{_title(chart, chart.x)} {left:g}", f"{right:g}")
    return _legend(chart) + _frame("".join(parts), words, low, high, *ends)


def _legend(chart: Chart) -> str:
    """The names of what is drawn, in its colours."""
    names = (
        f'<span style="color:{SERIES[i % len(SERIES)]}">{escape(_title(chart, name))}</span>'
        for i, name in enumerate(chart.y)
    )
    return f"<div>{' · '.join(names)}</div>"


def _histogram(chart: Chart) -> str:
    """Bins side by side, what is in each on top of one another; lines where there are marks."""
    left, right = _numbers(chart, chart.x), _numbers(chart, chart.until)
    counts = [np.nan_to_num(_numbers(chart, name)) for name in chart.y]
    low, high = float(left[0]), float(right[-1])
    top = float(np.sum(counts, axis=0).max(initial=0)) or 1.0
    starts, ends = _places(left, low, high), _places(right, low, high)
    parts, floor = [], np.zeros(len(left))
    for number, values in enumerate(counts):
        above, below = (_heights(each, 0.0, top) for each in (floor + values, floor))
        colour = SERIES[number % len(SERIES)]
        parts += [
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{until - x:.1f}" height="{base - y:.1f}" '
            f'fill="{colour}"/>'
            for x, until, y, base in zip(starts, ends, above, below, strict=True)
            if base > y
        ]
        floor = floor + values
    parts += [
        f'<path d="M{x:.1f} 8V{_HEIGHT - _BOTTOM}" stroke="currentColor" stroke-dasharray="4 3"/>'
        for x in _places(np.array(chart.marks, float), low, high)
    ]
    words = f"{chart.title or chart.table.title}: a histogram"
    names = (four_digits(low), four_digits(high))
    legend = _legend(chart) if len(counts) > 1 else ""
    return legend + _frame("".join(parts), words, 0.0, top, *names)


def _scatter(chart: Chart) -> str:
    xs, ys = _numbers(chart, chart.x), _numbers(chart, chart.y[0])
    (left, right), (low, high) = _spread(xs), _spread(ys)
    points = zip(_places(xs, left, right), _heights(ys, low, high), strict=True)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{SERIES[0]}" fill-opacity=".55"/>'
        for x, y in points
        if math.isfinite(x) and math.isfinite(y)
    )
    words = f"{_title(chart, chart.y[0])} over {_title(chart, chart.x)}"
    ends = (f"{_title(chart, chart.x)} {four_digits(left)}", four_digits(right))
    return _frame(dots, words, low, high, *ends)


def _bars(chart: Chart) -> str:
    names = [str(name) for name in _column(chart, chart.x)][:_BARS]
    ys = np.nan_to_num(_numbers(chart, chart.y[0]))[: len(names)]
    low, high = min(0.0, float(ys.min(initial=0))), max(0.0, float(ys.max(initial=0)))
    high = high if high > low else low + 1
    width = (_WIDTH - _LEFT - 20) / max(len(names), 1)
    zero = float(_heights(np.zeros(1), low, high)[0])
    parts = []
    for i, (name, y, value) in enumerate(zip(names, _heights(ys, low, high), ys, strict=True)):
        colour = SERIES[1] if value < 0 else SERIES[0]
        parts.append(
            f'<rect x="{_LEFT + 6 + i * width:.1f}" y="{min(y, zero):.1f}" '
            f'width="{width * 0.8:.1f}" height="{abs(zero - y):.1f}" fill="{colour}">'
            f"<title>{escape(escaped(name))}: {four_digits(float(value))}</title></rect>"
        )
    words = f"{_title(chart, chart.y[0])} by {_title(chart, chart.x)}"
    ends = (names[0][:28], names[-1][:28]) if names else ("", "")
    return _frame("".join(parts), words, low, high, *ends)
