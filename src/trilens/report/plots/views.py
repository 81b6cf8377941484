"""Heads, the logit lens and profiles over layers as figures."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.ticker import MaxNLocator

from trilens.errors import OutOfRangeError
from trilens.report.colours import INK, SERIES
from trilens.report.mosaic import mosaic
from trilens.report.page import Heads, LensGrid, Profiles
from trilens.report.patterns import HeadPatterns
from trilens.report.plots.charts import label_ticks
from trilens.report.plots.style import PaperFigure, heading, new_figure, plain, ramp
from trilens.report.words import token_text

__all__ = ["heads_figure", "lens_figure", "pattern_figure", "profiles_figure"]

_SIDE = 1600
_WORDS = 64
_LENS_TOKENS = 24
_KINDS = {"softmax": "attention weight", "effective": "effective attention weight"}


def heads_figure(block: Heads) -> PaperFigure:
    """All heads, a tile each; a row per layer."""
    patterns = block.patterns
    grid, step = mosaic(patterns, _SIDE)
    height, width = grid.shape
    columns, rows = max(patterns.heads), len(patterns.layers)
    inches = min(1.0, 6.4 / columns, 8.0 / rows)
    figure, axes = new_figure(1.6 + columns * inches, 0.8 + rows * inches)
    low = -1.0 if patterns.signed else 0.0
    image = axes.imshow(
        np.ma.masked_invalid(grid), cmap=ramp(diverging=patterns.signed), vmin=low, vmax=1.0,
        extent=(0, width, height, 0), interpolation="nearest",
    )  # fmt: skip
    axes.set_xticks([step * (i + 0.5) for i in range(columns)], [str(i) for i in range(columns)])
    axes.set_yticks([step * (i + 0.5) for i in range(rows)], [str(i) for i in patterns.layers])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(f"{_KINDS[patterns.kind]}s of all heads")
    bar = figure.colorbar(image, ax=axes, label=f"{_KINDS[patterns.kind]} / largest of its head")
    shares = [-1, -0.25, 0, 0.25, 1] if patterns.signed else [0, 0.05, 0.25, 0.5, 1]
    bar.set_ticks(
        [math.copysign(math.sqrt(abs(x)), x) for x in shares], labels=[str(x) for x in shares]
    )
    return figure


def pattern_figure(
    patterns: HeadPatterns, layer: int, head: int, tokens: tuple[str, ...]
) -> PaperFigure:
    """One head: queries downwards, keys to the right.

    Raises:
        OutOfRangeError: no such layer, or no such head in it.
    """
    if layer not in patterns.layers:
        known = ", ".join(map(str, patterns.layers))
        raise OutOfRangeError(f"layer {layer} is not here: the layers are {known}")
    count = patterns.heads[patterns.layers.index(layer)]
    if not 0 <= head < count:
        raise OutOfRangeError(f"head {head} is out of range: layer {layer} has 0–{count - 1}")
    weights = patterns.weights(layer, head)
    inches = min(6.5, max(3.0, 1.6 + 0.17 * patterns.side))
    figure, axes = new_figure(inches + 1.2, inches)
    largest = float(np.abs(weights).max()) or 1.0
    image = axes.imshow(
        weights, cmap=ramp(diverging=patterns.signed), interpolation="nearest",
        vmin=-largest if patterns.signed else 0.0, vmax=largest,
    )  # fmt: skip
    worded = len(tokens) == patterns.side <= _WORDS
    names: list[object] = [i * patterns.pool for i in range(patterns.side)]
    if worded:
        names = [f"{i} {token_text(token)}" for i, token in enumerate(tokens)]
    label_ticks(axes, "x", names, _WORDS if worded else 16)
    label_ticks(axes, "y", names, _WORDS if worded else 16)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"layer {layer}, head {head}")
    figure.colorbar(image, ax=axes, label=_KINDS[patterns.kind])
    return figure


def lens_figure(block: LensGrid, tokens: tuple[str, ...]) -> PaperFigure:
    """What each layer would predict after the last tokens: the word, and how probable it is."""
    last = len(block.positions)
    first = max(0, last - _LENS_TOKENS)
    shares = np.array([[row[0] for row in each[first:last]] for each in block.probabilities])
    rows, columns = shares.shape
    figure, axes = new_figure(1.6 + 0.62 * columns, 1.1 + 0.26 * rows)
    image = axes.pcolormesh(
        np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, shares,
        cmap=ramp(diverging=False), vmin=0.0, vmax=1.0,
    )  # fmt: skip
    for i, each in enumerate(block.top):
        for j, best in enumerate(each[first:last]):
            colour = "white" if shares[i, j] > 0.6 else INK
            words = plain(block.texts[best[0]], 9)
            axes.text(j, i, words, ha="center", va="center", fontsize=6, color=colour)
    positions = block.positions[first:last]
    names: list[object] = list(positions)
    if tokens:
        names = [f"{p} {token_text(tokens[p])}" for p in positions]
    label_ticks(axes, "x", names, _LENS_TOKENS)
    label_ticks(axes, "y", block.layers, 48)
    axes.set_xlabel("token")
    axes.set_ylabel("layer")
    axes.set_title("logit lens: the most probable next token")
    figure.colorbar(image, ax=axes, label="probability")
    return figure


def profiles_figure(block: Profiles, token: int) -> PaperFigure:
    """Quantities over the layers: of one token, and from the smallest to the largest of all."""
    count = len(block.columns)
    columns = min(3, count)
    rows = -(-count // columns)
    figure = PaperFigure(figsize=(3.0 * columns, 2.3 * rows), layout="constrained")
    for i, column in enumerate(block.columns):
        axes = figure.add_subplot(rows, columns, i + 1)
        values = np.array(
            [[math.nan if x is None else x for x in row] for row in block.values[i]], float
        )
        if not -values.shape[1] <= token < values.shape[1]:
            raise OutOfRangeError(
                f"token {token} is out of range: the prompt has 0–{values.shape[1] - 1}"
            )
        layers = list(block.layers[i])
        low = np.where(np.isfinite(values), values, np.inf).min(1)
        high = np.where(np.isfinite(values), values, -np.inf).max(1)
        axes.fill_between(layers, low, high, color=SERIES[0], alpha=0.16, linewidth=0)
        axes.plot(layers, values[:, token], color=SERIES[0], marker="o", markersize=4)
        axes.set_xlabel("layer")
        axes.set_ylabel(heading(column))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
