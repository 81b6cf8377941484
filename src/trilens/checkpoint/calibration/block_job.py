"""What is ternarized in a block, and all that coding it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.fit import FitOptions, transposed
from trilens.checkpoint.calibration.streams import Batch, Stream
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.rotation import plain_weights
from trilens.ternary.calibrated.rules import CALIBRATED_RULES, CalibratedRule
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["BlockJob", "BlockMatrix", "held_weight", "put_matrix", "rule_of"]


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A matrix that is ternarized, and where it stands in its block.

    Attributes:
        name: The stored tensor's.
        path: The module's path in the block; "" for a part of a parameter without a module.
        parameter: The parameter's name in the block.
        expert: Its number among the matrices of one stored tensor.
        place: Of a part: how its values are found in the parameter.
        transposed: It is stored as [in, out].
        reason: Of a part: why its inputs are not seen.
    """

    name: str
    path: str
    parameter: str
    expert: int = 0
    place: Callable[[Tensor], Tensor] | None = None
    transposed: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class BlockJob:
    """All that coding a block needs.

    Attributes:
        index: The block's number.
        matrices: What is ternarized in it.
        vectors: Its norms and biases that may be fitted: parameter in the block → stored tensor
            and dtype.
        batches: The text.
        held_out: The text set apart: measured on, never fitted to; its place in the streams is
            after the text's.
        dense: The dense model's residual stream before the block.
        ternary: The ternary model's.
        plan: Group size and scales' dtype.
        rule: What is done; None for the plan's rule, which looks at weights alone.
        fit: How norms, biases and scales are fitted.
        put_earlier: Puts into a dense copy of the block what was coded where an earlier block runs
            the same weights.
    """

    index: int
    matrices: tuple[BlockMatrix, ...]
    vectors: Mapping[str, tuple[str, torch.dtype]]
    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    dense: Stream
    ternary: Stream
    plan: TernaryPlan
    rule: CalibratedRule | None
    fit: FitOptions
    put_earlier: Callable[[nn.Module], None] = lambda _block: None


def rule_of(
    plan: TernaryPlan, rule: CalibratedRule | None, matrix: BlockMatrix
) -> CalibratedRule | None:
    """What is done with a matrix: the plan's own entry for it goes before `rule`."""
    entry = plan.matrices.get(matrix.name)
    return rule if entry is None else CALIBRATED_RULES.get(entry.rule)


def held_weight(block: nn.Module, matrix: BlockMatrix) -> Tensor:
    """A matrix as a block holds it. Shapes: → [out, in]."""
    if matrix.place is None:
        weight = block.get_parameter(f"{matrix.path}.weight").data
        return weight.T if transposed(block, matrix.path) else weight
    part = matrix.place(block.get_parameter(matrix.parameter).data)
    return part.T if matrix.transposed else part


def put_matrix(
    block: nn.Module, matrix: BlockMatrix, quant: PerLayerQuant, plan: TernaryPlan
) -> None:
    """Put Ŵ into a block in place of the matrix."""
    held_weight(block, matrix).copy_(plain_weights(quant, plan))
