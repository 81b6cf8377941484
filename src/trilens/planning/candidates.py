"""What a matrix can become: each rule without data at several group sizes, or not quantized.

A candidate is one entry: a name, its entry in a plan, and a function from a matrix to what
survives of it. Its bits follow from the plan, counted as the checkpoint counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from trilens.checkpoint.coding import packed_parts
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.checkpoint.format.plan import Storage, TernaryPlan
from trilens.errors import UsageError
from trilens.planning.matrices import ModelMatrix
from trilens.ternary.calibrated.rules import CALIBRATED_RULES
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.coder import ScaleDtype
from trilens.ternary.rules.rules import FOUR_LEVELS, RULES, RuleName

__all__ = ["EXCLUDED", "GROUP_SIZES", "Candidate", "data_free", "of_plan"]

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that a matrix can become.

    Attributes:
        entry: The entry of the matrix in a plan.
        plan: How it is stored: `TernaryPlan` for this matrix alone; None where it is not quantized.
        reconstruct: From a matrix [rows, cols] and its name to the matrix that the trits stand for,
            float32 [rows, cols]; None where it is not quantized.
    """

    entry: MatrixPlan
    plan: TernaryPlan | None = None
    reconstruct: Callable[[Tensor, str], Tensor] | None = None

    @property
    def name(self) -> str:
        """As in tables: "exact g128"."""
        return self.entry.label

    def size_bytes(self, matrix: ModelMatrix) -> int:
        """Everything stored for the matrix."""
        if self.plan is None:
            return matrix.n_weights * matrix.dense_bytes
        parts = packed_parts(matrix.lead, matrix.rows, matrix.cols, self.plan)
        return sum(size_bytes for *_, size_bytes in parts)

    def bits_per_weight(self, matrix: ModelMatrix) -> float:
        """Everything stored for the matrix, in bits for each weight."""
        return 8 * self.size_bytes(matrix) / matrix.n_weights

    def apply(self, matrix: ModelMatrix, weights: Tensor) -> Tensor:
        """What the parameter becomes.

        Shapes: weights, and what is given back: those of the parameter

        Raises: as `PerLayerQuant.quantize`.
        """
        if self.reconstruct is None:
            return weights
        new = torch.empty_like(weights)
        pairs = zip(matrix.of(weights), matrix.of(new), strict=True)
        for index, (old, into) in enumerate(pairs):
            name = f"{matrix.target}[{index}]" if matrix.lead else matrix.target
            into.copy_(self.reconstruct(old, name))
        return new


EXCLUDED = Candidate(MatrixPlan("keep"))


def of_plan(
    entry: MatrixPlan, *, scale_dtype: ScaleDtype = "float32", storage: Storage = "two_bit"
) -> Candidate:
    """The candidate of one rule that needs no data, or `EXCLUDED`.

    Raises:
        UsageError: an option that does not exist.
    """
    if entry.rule == "keep":
        return EXCLUDED
    if entry.rule in CALIBRATED_RULES:
        raise UsageError(
            f"rule {entry.rule!r} needs a calibration text, which is not looked at here: take one "
            f"of {', '.join(RULES)}, and calibrate in ternarize"
        )
    plan = TernaryPlan(
        rule=entry.rule,
        per=entry.per,
        group_size=entry.group_size,
        scale_dtype=scale_dtype,
        storage=storage,
    )

    rule = cast("RuleName", entry.rule)

    def reconstruct(weights: Tensor, name: str) -> Tensor:
        quant = PerLayerQuant.quantize(
            weights,
            name,
            rule=rule,
            group_size=plan.group_size,
            per=plan.per,
            scale_dtype=scale_dtype,
        )
        return quant.reconstruct()

    return Candidate(entry, plan, reconstruct)


def data_free(
    matrix: ModelMatrix, *, scale_dtype: ScaleDtype, storage: Storage, exclude: bool = True
) -> tuple[Candidate, ...]:
    """Every candidate of one matrix: each rule with each grouping that its shape allows.

    Args:
        matrix: the matrix.
        scale_dtype: of all scales.
        storage: of all codes.
        exclude: whether not quantizing it is a candidate too.
    """
    entries = []
    for rule in RULES:
        if rule in FOUR_LEVELS and storage == "compact":
            continue
        if not matrix.merged:
            # One scale for all that transformers merged would not be the scale that is stored.
            entries.append(MatrixPlan(rule, per="tensor"))  # type: ignore[arg-type]
        entries.append(MatrixPlan(rule, per="row"))  # type: ignore[arg-type]
        entries += [
            MatrixPlan(rule, group_size=size)  # type: ignore[arg-type]
            for size in GROUP_SIZES
            if size < matrix.cols
        ]
    found = [of_plan(entry, scale_dtype=scale_dtype, storage=storage) for entry in entries]
    return (*found, EXCLUDED) if exclude else tuple(found)
