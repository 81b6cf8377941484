"""The rules that look at what a matrix gets: from weights and moments to trits and scales.

    rule           what it does
    gptq           exact group scales, columns by falling energy, each taking up earlier errors
    gptq_planes    the same with two planes of trits
    gptq_quad      the same with the four levels of `quad`
    best           gptq; then scales by least squares under H and trits by coordinate descent,
                   alternating until nothing helps
    best_planes    the same with two planes
    best_quad      the same with four levels

They lower the error of the matrix's outputs, Σ‖Ŵx − y‖², not that of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from trilens.errors import ShapeError, UsageError
from trilens.ternary.calibrated.descent import (
    Grid,
    code_in_order,
    coding_order,
    improve_trits,
    loss,
    refit_scales,
)
from trilens.ternary.calibrated.hessian import Hessian, Moments, upper_factor, wide
from trilens.ternary.granularity import Per, Units
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.coder import ScaleDtype
from trilens.ternary.rules.rules import FOUR_LEVELS, RULES, RuleName
from trilens.ternary.weights_view import WeightsLike, view_weights

__all__ = [
    "CALIBRATED_RULES",
    "Calibrated",
    "CalibratedName",
    "CalibratedRule",
    "calibrate",
    "check_rule",
    "find_calibrated",
    "levels_of",
    "n_planes_of",
    "refine",
]


CalibratedName: TypeAlias = Literal[
    "gptq", "gptq_planes", "gptq_quad", "best", "best_planes", "best_quad"
]

DAMPINGS = (0.003, 0.01, 0.03, 0.1)
"""What may be added to H's diagonal, of its mean; the one with the least loss is taken."""

_TRIAL_ROWS = 64  # rows on which dampings are compared
_ROUNDS = 12  # of alternating minimisation, at most
_CONVERGED = 1e-4  # of the loss: a round that gains less is the last


@dataclass(frozen=True, slots=True)
class CalibratedRule:
    """What a calibrated rule does.

    Attributes:
        name: As plans and files call it.
        start: The rule without data that gives its first scales.
        refined: Scales and trits are improved by alternating minimisation after coding.
        corrected: It aims at what the dense matrix gave for the dense model's inputs, not at the
            dense weights: errors of earlier layers are repaired.
        repairs_residual: Matrices that add to the residual stream aim at what the stream should be
            after them.
        fits_block: Norms, biases and scales of the block are then fitted to the dense block.
        fits_whole: Those of all blocks are then fitted together to the dense model's logits.
    """

    name: str
    start: RuleName
    refined: bool
    corrected: bool
    repairs_residual: bool
    fits_block: bool
    fits_whole: bool

    @property
    def n_planes(self) -> int:
        """Planes of trits."""
        return 2 if self.start == "planes" else 1

    @property
    def levels(self) -> int:
        """Levels of a plane: 4 where 2 is one."""
        return 4 if self.start in FOUR_LEVELS else 3


CALIBRATED_RULES: Mapping[str, CalibratedRule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            CalibratedRule("gptq", "exact", False, False, False, False, False),
            CalibratedRule("gptq_planes", "planes", False, False, False, False, False),
            CalibratedRule("gptq_quad", "quad", False, False, False, False, False),
            CalibratedRule("best", "exact", True, True, True, True, True),
            CalibratedRule("best_planes", "planes", True, True, True, True, True),
            CalibratedRule("best_quad", "quad", True, True, True, True, True),
        )
    }
)
"""Every calibrated rule by its name."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """A matrix coded with the help of a text.

    Attributes:
        quant: The trits and scales.
        output_error: Σ‖Ŵx − y‖² / Σ‖y‖² on the calibration text.
        damping: What was added to H's diagonal, of its mean; None where nothing was coded by H.
        n_tokens: Inputs that H is the sum of.
        dead_channels: Input channels that were 0 throughout.
        changes: Trits that coordinate descent changed.
    """

    quant: PerLayerQuant
    output_error: float
    damping: float | None
    n_tokens: int
    dead_channels: int
    changes: int = 0


def calibrate(
    weights: WeightsLike,
    name: str,
    moments: Moments,
    *,
    rule: str | CalibratedRule = "best",
    group_size: int | None = None,
    per: Per | None = None,
    scale_dtype: ScaleDtype | None = None,
) -> Calibrated:
    """Code a matrix by a calibrated rule.

    Weights that are ternary already keep their trits and scale, as by every rule. Input channels
    that the text leaves at 0 are rounded to the nearest level.

    Shapes: weights [rows, cols]

    Args:
        weights: the dense matrix.
        name: what errors call it.
        moments: what the text says about it.
        rule: one of `CALIBRATED_RULES`, or a rule of your own making.
        group_size: as for `PerLayerQuant.quantize`.
        per: likewise.
        scale_dtype: likewise.

    Raises:
        UsageError: an unknown rule or option.
        ShapeError: no matrix, or moments of other shapes.
        NonFiniteError: NaN or Inf among the weights, or a Hessian that is none.
        ValueRangeError: a scale beyond its dtype.

    Memory: about 40·rows·cols + 32·cols² bytes.
    """
    found = find_calibrated(rule) if isinstance(rule, str) else rule
    view = view_weights(weights, name)
    if len(view.shape) != 2 or moments.cross.shape != view.shape:
        raise ShapeError(
            f"moments of {name!r} are for a matrix {moments.cross.shape}, its shape is {view.shape}"
        )
    hessian = moments.hessian
    dense = wide(view.read(0, view.size).reshape(view.shape), hessian.device)
    options: dict[str, Any] = {"group_size": group_size, "per": per, "scale_dtype": scale_dtype}
    plain = PerLayerQuant.quantize(weights, name, rule=found.start, **options)
    dead = int(hessian.dead.sum())
    if plain.was_ternary:
        error = moments.output_error(plain.reconstruct())
        return Calibrated(plain, error, None, hessian.n_tokens, dead)
    target = moments.best_weights(dense) if found.corrected else dense
    grid = _start(target, name, plain.units, found, scale_dtype)
    grid, damping = _code(grid, target, hessian)
    changes = 0
    if found.refined:
        grid, changes = refine(grid, target, hessian, name=name, scale_dtype=scale_dtype)
    quant = replace(
        _as_quant(grid, plain), rule=found.name, was_ternary=False, zeroed_units=plain.zeroed_units
    )
    error = moments.output_error(quant.reconstruct())
    return Calibrated(quant, error, damping, hessian.n_tokens, dead, changes)


def check_rule(name: str) -> None:
    """Refuse a name that is neither a calibrated rule nor one without data.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(name, str) or (name not in CALIBRATED_RULES and name not in RULES):
        raise UsageError(
            f"rule {name!r} is unknown: the rules are {', '.join(RULES)}, and with a calibration "
            f"text {', '.join(CALIBRATED_RULES)}"
        )


def n_planes_of(rule: str) -> int:
    """How many planes of trits a rule makes, calibrated or not."""
    found = CALIBRATED_RULES.get(rule)
    return found.n_planes if found is not None else 1 + (rule == "planes")


def levels_of(rule: str) -> int:
    """How many levels a plane of the rule has, calibrated or not: 4 where 2 is one, else 3."""
    found = CALIBRATED_RULES.get(rule)
    return found.levels if found is not None else 4 if rule in FOUR_LEVELS else 3


def find_calibrated(name: str) -> CalibratedRule:
    """The calibrated rule of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in CALIBRATED_RULES:
        raise UsageError(
            f"rule {name!r} is no calibrated rule: these are {', '.join(CALIBRATED_RULES)}"
        )
    return CALIBRATED_RULES[name]


def refine(
    grid: Grid,
    target: Tensor,
    hessian: Hessian,
    *,
    name: str,
    scale_dtype: ScaleDtype | None = None,
) -> tuple[Grid, int]:
    """Alternating minimisation: scales by least squares, trits by coordinate descent.

    Each round can only lower the loss, but for the rounding of the scales, which is why it counts
    only where it does.

    Shapes: target [rows, cols]

    Returns:
        The grid, its scales rounded, and how many trits changed.
    """
    best, least, total = grid, loss(grid, target, hessian), 0
    for _ in range(_ROUNDS):
        trial = refit_scales(best, target, hessian).rounded(scale_dtype, name)
        trial, changes = improve_trits(trial, target, hessian)
        now = loss(trial, target, hessian)
        if now >= least:
            break
        converged = least - now <= _CONVERGED * least
        best, least, total = trial, now, total + changes
        if converged:
            break
    return best, total


def _start(
    target: Tensor,
    name: str,
    units: Units,
    rule: CalibratedRule,
    scale_dtype: ScaleDtype | None,
) -> Grid:
    """The scales that the rule without data gives the target."""
    first = PerLayerQuant.quantize(
        target.cpu(),
        name,
        rule=rule.start,
        per=units.per,
        group_size=units.group_size,
        scale_dtype=scale_dtype or "float32",
    )
    scales = [first.scales]
    if first.second_scale is not None:
        scales.append(np.asarray(first.second_scale, dtype=np.float32).reshape(-1))
    found = np.stack(scales, axis=1)
    return Grid.empty(units, found, levels=rule.levels, device=target.device)


def _code(grid: Grid, target: Tensor, hessian: Hessian) -> tuple[Grid, float]:
    """GPTQ with the damping that is best on a few rows, spread over the matrix."""
    step = max(1, len(target) // _TRIAL_ROWS)
    rows = torch.arange(0, len(target), step, device=target.device)[:_TRIAL_ROWS]
    few = replace(grid, trits=grid.trits[rows], scales=grid.scales[rows])
    order = coding_order(hessian)
    best: tuple[float, float, Tensor] | None = None
    for damping in DAMPINGS:
        upper = upper_factor(hessian, order, damping)
        tried = code_in_order(few, target[rows], hessian, damping=damping, upper=upper)
        now = loss(tried, target[rows], hessian)
        if best is None or now < best[0]:
            best = (now, damping, upper)
    assert best is not None
    _, damping, upper = best
    return code_in_order(grid, target, hessian, damping=damping, upper=upper), damping


def _as_quant(grid: Grid, like: PerLayerQuant) -> PerLayerQuant:
    planes = [grid.trits[:, p].cpu().contiguous() for p in range(grid.n_planes)]
    scales = grid.unit_scales.cpu()
    two = grid.n_planes == 2
    return PerLayerQuant.from_trits(
        planes[0],
        scales[:, 0].clone(),
        like.name,
        group_size=like.group_size,
        per=like.per,
        second_trits=planes[1] if two else None,
        second_scale=scales[:, 1].clone() if two else None,
        scale_dtype=like.scale_dtype,
        levels=grid.levels,
    )
