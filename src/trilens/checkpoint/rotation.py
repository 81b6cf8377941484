"""Matrices that are rotated before they are coded, and rotated back where they are used plain."""

from __future__ import annotations

from torch import Tensor

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.errors import UsageError
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate, rotate_back

__all__ = ["plain_weights", "to_be_coded"]


def to_be_coded(matrix: Tensor, name: str, plan: TernaryPlan) -> Tensor:
    """A matrix as the plan codes it: rotated, where it rotates.

    Shapes: [rows, cols] → the same

    Args:
        matrix: the matrix, rows being outputs.
        name: what errors call it.
        plan: what becomes of it.

    Raises:
        UsageError: it is ternary already, which rotating would undo.
        NonFiniteError: NaN or Inf among the weights.
    """
    if not plan.rotate:
        return matrix
    as_it_is = PerLayerQuant.quantize(matrix, name, group_size=plan.group_size, per=plan.per)
    if as_it_is.was_ternary and bool(as_it_is.trits.any()):
        raise UsageError(
            f"{name} is ternary already, and would not be when it is rotated: leave rotate out, or "
            "keep the matrix"
        )
    return rotate(matrix.float())


def plain_weights(quant: PerLayerQuant, plan: TernaryPlan) -> Tensor:
    """Ŵ as a plain layer would hold it. Shapes: → float32 [rows, cols]."""
    weights = quant.reconstruct()
    return rotate_back(weights) if plan.rotate else weights
