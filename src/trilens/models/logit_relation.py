"""Measured constants: whether one tensor is another times a factor, perhaps under a tanh cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Relation", "relate"]

_UNCAPPED = 0.9
"""Share of the cap up to which atanh still tells what went in."""
_TOLERANCE_EPS = 8
"""Largest difference that counts as rounding, in units of eps · max|b|."""


@dataclass(frozen=True, slots=True)
class Relation:
    """b = scale · a, or b = softcap · tanh(scale · a / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, a: Tensor) -> Tensor:
        """What the relation makes of a."""
        if self.softcap is None:
            return a * self.scale
        return self.softcap * torch.tanh(a * self.scale / self.softcap)


def relate(a: Tensor, b: Tensor, constants: Sequence[float] = ()) -> Relation | None:
    """The relation that gives b from a, or None.

    Args:
        a: floating point.
        b: of the same shape; its dtype or a's, whichever is coarser, says what rounding may do.
        constants: tanh caps to try, and values (or their inverses) that a factor may stand for.
    """
    if a.shape != b.shape or not a.is_floating_point() or not b.is_floating_point():
        return None
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    # PROMOTE: the factor is a quotient of sums over a vocabulary.
    x, y = a.double(), b.double()
    if torch.equal(x, y):
        return Relation()
    best: Relation | None = None
    least = float(y.abs().max()) * eps * _TOLERANCE_EPS
    for cap in (None, *constants):
        relation = _fit(x, y, cap, constants, eps)
        error = float("inf") if relation is None else float((relation.apply(x) - y).abs().max())
        if error < least or (error <= least and best is None):
            best, least = relation, error
    return best


def _fit(
    x: Tensor, y: Tensor, cap: float | None, constants: Sequence[float], eps: float
) -> Relation | None:
    inner = y if cap is None else cap * torch.atanh((y / cap).clamp(-_UNCAPPED, _UNCAPPED))
    usable = torch.ones_like(y) if cap is None else (y.abs() < _UNCAPPED * cap).double()
    norm = float((x * x * usable).sum())
    if norm == 0.0:
        return None
    return Relation(_snap(float((x * inner * usable).sum()) / norm, constants, eps), cap)


def _snap(scale: float, constants: Sequence[float], eps: float) -> float:
    """The constant that a measured factor stands for, where one is within rounding."""
    known = (1.0, *constants, *(1 / value for value in constants))
    nearest = min(known, key=lambda value: abs(value - scale))
    return nearest if abs(nearest - scale) <= 2 * eps * abs(scale) else scale
