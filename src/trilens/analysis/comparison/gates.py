"""Gates of two models on the same tokens: openness, dead and saturated units, memory horizon.

Dead and saturated mean what they mean in `GatingAnalysis`; here one sum per unit is held, and the
tokens of a prompt are summed where they are, for a comparison looks at every gate of every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trilens.analysis.comparison.rows import Place, Row
from trilens.caches.gate_spec import GateSpec
from trilens.caches.gates import GateCache
from trilens.errors import IncomparableError

__all__ = ["GateAccumulator", "UnitAverages"]


@dataclass(frozen=True, slots=True, eq=False)
class UnitAverages:
    """Mean openness of a gate's units, float64 [units] each."""

    name: str
    layer: int
    before: Tensor
    after: Tensor


@dataclass(slots=True)
class _Tally:
    """Sums of one gate, on both sides."""

    open: list[Tensor | None] = field(default_factory=lambda: [None, None])
    log_decay: list[Tensor | None] = field(default_factory=lambda: [None, None])
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: int = 0


class GateAccumulator:
    """Takes both gate caches, prompt by prompt.

    Args:
        threshold: dead below it, saturated above 1 − it; in [0, 0.5].

    Memory:
        16 to 32 bytes per unit, gate and layer.
    """

    __slots__ = ("_tallies", "_threshold")

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._tallies: dict[tuple[str, int], _Tally] = {}

    def add(self, name: str, layer: int, before: GateCache, after: GateCache) -> None:
        """One prompt's gate of one layer.

        Raises:
            IncomparableError: the two are not the same kind of gate.
        """
        specs = [cache.spec(name, layer) for cache in (before, after)]
        _check(name, layer, specs[0], specs[1])
        tally = self._tallies.get((name, layer))
        if tally is not None and specs[0].static:
            return  # the same for every prompt
        if tally is None:
            tally = self._tallies[name, layer] = _Tally()
        steps = 0
        for side, cache in enumerate((before, after)):
            if not specs[side].has_openness:
                values = cache.get(name, layer).double()
                tally.squares[side] += float(values.square().mean(-1).sum())
                steps = len(values)
                continue
            steps, opened = _summed(cache.openness(name, layer))
            tally.open[side] = _plus(tally.open[side], opened)
            if specs[side].kind == "decay":
                # ln a adds up along the tokens: its mean is the decay that would forget as much.
                logs = -math.log(2.0) / cache.half_life_tokens(name, layer)
                tally.log_decay[side] = _plus(tally.log_decay[side], _summed(logs)[1])
        tally.steps += steps

    def units(self) -> list[UnitAverages]:
        """Averages of every gate that has an openness."""
        return [
            UnitAverages(name, layer, tally.open[0] / tally.steps, tally.open[1] / tally.steps)
            for (name, layer), tally in sorted(self._tallies.items())
            if tally.open[0] is not None and tally.open[1] is not None
        ]

    def rows(self) -> list[Row]:
        """Per gate and layer."""
        found = []
        averages = {(unit.name, unit.layer): unit for unit in self.units()}
        for (name, layer), tally in sorted(self._tallies.items()):
            at, unit = Place(name, layer), averages.get((name, layer))
            if unit is None:
                rms = [math.sqrt(total / tally.steps) for total in tally.squares]
                found.append(at.change("value_rms", *rms))
                continue
            found += self._rows(unit)
            before, after = tally.log_decay
            if before is not None and after is not None:
                horizons = [_horizon(each / tally.steps) for each in (before, after)]
                found.append(at.change("horizon_tokens", *horizons))
        return found

    def _rows(self, unit: UnitAverages) -> list[Row]:
        at = Place(unit.name, unit.layer)
        pair = (unit.before, unit.after)
        dead = [each < self._threshold for each in pair]
        saturated = [each > 1.0 - self._threshold for each in pair]
        n = len(unit.before)

        def count(which: Tensor) -> float:
            return float(which.sum())

        def capacity(side: int) -> float:
            return (n - count(dead[side]) - count(saturated[side])) / n

        moved = float((unit.after - unit.before).abs().mean())
        return [
            at.change("openness", *(float(each.mean()) for each in pair)),
            at.against_itself("openness_abs_change", moved),
            at.change("dead", *map(count, dead)),
            at.change("saturated", *map(count, saturated)),
            at.against_itself("newly_dead", count(dead[1] & ~dead[0])),
            at.against_itself("newly_saturated", count(saturated[1] & ~saturated[0])),
            at.change("effective_capacity", capacity(0), capacity(1)),
        ]


def _check(name: str, layer: int, before: GateSpec, after: GateSpec) -> None:
    for what in ("kind", "function", "shape"):
        mine, other = getattr(before, what), getattr(after, what)
        if mine != other:
            raise IncomparableError(
                f"gate {name!r} of layer {layer} has {what} {mine!r} before and {other!r} after: "
                "only gates of one kind, function and shape can be compared"
            )


def _summed(values: Tensor) -> tuple[int, Tensor]:
    """Steps and their sum, float64 [units] on the CPU."""
    # One prompt in float32 is off by 1e-7; only the sum over prompts needs more.
    return values.shape[0], values.sum(0).double().cpu()


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _horizon(log_decay: Tensor) -> float:
    """Median over units of 1/(1 − a)."""
    # PROMOTE: 1 − a has no digits left for a near 1; −expm1(ln a) has all of them.
    horizons = (1.0 / -torch.expm1(log_decay)).cpu().numpy()
    return float(np.median(horizons))
