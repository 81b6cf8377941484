"""`EffectSweep`: what edits do to a metric, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from trilens.analysis.points import Points
from trilens.analysis.sweeping import measure, measure_points, prompt_again
from trilens.edits import Edit
from trilens.lens.gradients import Metric
from trilens.lens.lens import Lens
from trilens.models.encoded import each_prompt
from trilens.models.tokens import PromptLike
from trilens.numbers import at_least
from trilens.progress import Progress

__all__ = ["EffectSweep", "Over", "SweepPoint", "swept"]

Over = Literal["layer", "head", "scale"]

SweepPoint = tuple[int, Any]
"""A layer, and a head, a scale, or None for the whole layer."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EffectSweep(Points):
    """A metric with each of many edits, and without any.

    Attributes:
        title: what was done: "mean ablation of attn.z".
        over: what the columns are: heads, scales, or nothing but the layer itself.
        layers: rows of `values`.
        columns: heads or scales; empty where a layer is edited as a whole.
        values: the metric with each edit, [layers, columns or 1], the mean over prompts; NaN where
            there is none: a head that a layer has not, or a point that an interrupt left out.
        base: the metric without edits, the mean over prompts.
        n_prompts: prompts that were run.
        complete: whether every point was run.
    """

    title: str
    over: Over
    layers: tuple[int, ...]
    columns: tuple[int, ...] | tuple[float, ...]
    values: NDArray[np.float64]
    base: float
    n_prompts: int = 1
    complete: bool = True

    @property
    def effects(self) -> NDArray[np.float64]:
        """What each edit adds to the metric: [layers, columns or 1]."""
        return self.values - self.base

    def table(self) -> list[dict[str, Any]]:
        """One row per point: layer, head or scale, value and effect."""
        effects, columns = self.effects, self.columns or (None,)
        return [
            {
                "layer": layer,
                **({} if column is None else {self.over: column}),
                "value": float(self.values[i, j]),
                "effect": float(effects[i, j]),
            }
            for i, layer in enumerate(self.layers)
            for j, column in enumerate(columns)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it; null where a point has no value."""
        return {
            "title": self.title,
            "over": self.over,
            "base": self.base,
            "n_prompts": self.n_prompts,
            "complete": self.complete,
            "points": self.json_rows(),
        }

    def __repr__(self) -> str:
        columns = f" × {len(self.columns)} {self.over}s" if self.columns else ""
        return (
            f"EffectSweep({self.title}, {len(self.layers)} layers{columns}: metric "
            f"{self.base:.4g} without)"
        )


def swept(
    lens: Lens,
    prompts: Sequence[PromptLike],
    metric: Metric,
    points: Sequence[SweepPoint],
    edits_of: Callable[[Sequence[SweepPoint]], Sequence[Edit]],
    *,
    title: str,
    over: Over,
    batch_size: SupportsIndex,
    progress: Progress | None,
) -> EffectSweep:
    """Run every prompt with the edits of every point, as `measure_points` says.

    Ctrl-C in the first prompt leaves points without a value, in a later one that prompt out.

    Raises:
        MetricError: no finite scalar.
        EditError: an edit that does not fit.
    """
    size = at_least(1, batch_size, "batch_size")
    given = list(each_prompt(prompts))
    plain = list(lens.capture_many(given, batch_size=1, residual=None))
    bases = [measure(metric, each) for each in plain]
    runs: list[list[float]] = []
    for number, (prompt, each) in enumerate(zip(given, plain, strict=True)):
        found = measure_points(
            lens, prompt_again(lens, prompt, each), metric, points, edits_of,
            batch_size=size, what=title, progress=progress,
            done=number * len(points), total=len(plain) * len(points),
        )  # fmt: skip
        whole = len(found) == len(points)
        if whole or not runs:
            runs.append(found)
        if not whole:
            break
    layers = tuple(dict.fromkeys(layer for layer, _ in points))
    columns = tuple(sorted({column for _, column in points} - {None}))
    values = np.full((len(layers), max(len(columns), 1)), math.nan)
    for (layer, column), *at in zip(points, *runs, strict=False):
        values[layers.index(layer), columns.index(column) if columns else 0] = np.mean(at)
    return EffectSweep(
        title=title,
        over=over,
        layers=layers,
        columns=columns,
        values=values,
        base=float(np.mean(bases[: len(runs)])),
        n_prompts=len(runs),
        complete=len(runs) == len(plain) and len(runs[0]) == len(points),
    )
