"""`PatchSweep`: what each patch makes of a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilens.analysis.points import Points

__all__ = ["By", "Direction", "PatchSweep"]

By = Literal["position", "head"]
Direction = Literal["denoise", "noise"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PatchSweep(Points):
    """What each patch makes of a metric.

    Attributes:
        site: what was patched.
        by: "position": one token of one layer; "head": all tokens of one head.
        direction: which way.
        method: "exact", or how the values were estimated.
        tokens: of the prompt that was run and patched.
        layers: rows of `values`.
        places: columns: positions, or heads.
        values: the metric with each patch, [layers, places]; NaN where there is none: a token
            without a partner in the other prompt, or a point that an interrupt left out.
        base: the metric of the run that is patched.
        target: the metric of the run whose values are put in.
        complete: whether every point was run.
        error: of an estimate, per layer: by how much the sum of its effects misses what patching
            the whole layer does, in the metric; None where it is not known.
    """

    site: str
    by: By
    direction: Direction
    method: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    places: tuple[int, ...]
    values: NDArray[np.float64]
    base: float
    target: float
    complete: bool = True
    error: tuple[float, ...] | None = None

    @property
    def effects(self) -> NDArray[np.float64]:
        """How far each patch takes the metric from `base` (0) to `target` (1): [layers, places]."""
        return (self.values - self.base) / (self.target - self.base)

    def table(self) -> list[dict[str, Any]]:
        """One row per point: layer, position and token or head, value and effect."""
        effects = self.effects
        return [
            {"layer": layer, **self._place(place)}
            | {"value": float(self.values[i, j]), "effect": float(effects[i, j])}
            for i, layer in enumerate(self.layers)
            for j, place in enumerate(self.places)
        ]

    def _place(self, place: int) -> dict[str, Any]:
        if self.by == "head":
            return {"head": place}
        return {"position": place, "token": self.tokens[place]}

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it; null where a point has no value."""
        return {
            "site": self.site,
            "by": self.by,
            "direction": self.direction,
            "method": self.method,
            "tokens": list(self.tokens),
            "base": self.base,
            "target": self.target,
            "complete": self.complete,
            "error": None if self.error is None else list(self.error),
            "points": self.json_rows(),
        }

    def __repr__(self) -> str:
        shape = f"{len(self.layers)} layers × {len(self.places)} {self.by}s"
        return (
            f"PatchSweep({self.site}, {shape}, {self.direction}, {self.method}: metric "
            f"{self.base:.4g} → {self.target:.4g})"
        )
