"""A matrix of a checkpoint as trits: coded by a plan, or unpacked where it is ternary already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import Outcome
from trilens.checkpoint.gguf.slots import Piece
from trilens.checkpoint.job import Job
from trilens.errors import ValueRangeError
from trilens.ternary.calibrated.rules import levels_of
from trilens.ternary.codecs.rows import expand_rows, unpack_rows
from trilens.ternary.granularity import Per
from trilens.ternary.histogram import LevelSample
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.rules import RuleName

__all__ = ["GgufMatrix", "matrix_of"]


@dataclass(frozen=True, slots=True, eq=False)
class GgufMatrix:
    """A matrix as trits, and what that cost.

    Attributes:
        quant: Trits [out, in] and float16 scales.
        relative_error: ‖W−Ŵ‖²/‖W‖² against what the source holds.
        was_ternary: The source held trits already.
    """

    quant: PerLayerQuant
    relative_error: float
    was_ternary: bool

    @property
    def outcome(self) -> tuple[Outcome, str]:
        """What a report calls it, and what is to be said of it."""
        four = self.quant.levels == 4
        coded: Outcome = "four levels" if four else "ternary"
        if not self.was_ternary:
            return coded, ""
        if self.relative_error == 0:
            return (coded, "its codes and scales are kept") if four else ("already ternary", "")
        return (
            coded,
            f"its {'codes' if four else 'trits'} are kept, its scale is rounded to float16",
        )


def matrix_of(job: Job, piece: Piece, plan: TernaryPlan, sample: LevelSample) -> GgufMatrix:
    """A matrix as trits: coded by the plan, or the trits that are there.

    Weights that are coded go into the sample, too.

    Raises:
        NonFiniteError: NaN or Inf among the weights.
        ValueRangeError: a scale that float16 does not hold.

    Memory: 1 byte per weight, plus what the rule needs.
    """
    choice = piece.choice
    if job.packed is not None and choice.name in job.packed:
        return _unpacked(job, piece, job.packed[choice.name])
    stored = job.source.tensor(choice.name)
    stored = stored if piece.expert is None else stored[piece.expert]
    matrix = stored.T if choice.transposed else stored
    plan = plan.of(choice.name)
    quant = PerLayerQuant.quantize(
        matrix,
        choice.name,
        rule=cast("RuleName", plan.rule),  # calibrated rules are refused before
        group_size=plan.group_size,
        per=plan.per,
        scale_dtype=plan.scale_dtype,
    )
    sample.add(matrix, quant)
    return GgufMatrix(quant, quant.relative_error(matrix), quant.was_ternary)


def _unpacked(job: Job, piece: Piece, parts: Mapping[str, str]) -> GgufMatrix:
    choice = piece.choice
    codes, scale = (job.source.tensor(parts[part]) for part in ("codes", "scale"))
    if piece.expert is not None:
        codes, scale = codes[piece.expert], scale[piece.expert]
    cols = piece.header.shape[-2 if choice.transposed else -1]
    own = job.plan.of(choice.name)
    trits = expand_rows(codes, cols) if own.storage == "compact" else unpack_rows(codes, cols)
    scale = scale.float()  # in compact checkpoints of their own dtype
    halves = scale.half().float()
    if not bool(torch.isfinite(halves).all()):
        raise ValueRangeError(
            f"scale {float(scale.abs().max()):g} of {choice.name!r} is beyond float16, which "
            "GGUF stores: at most 65504"
        )
    grouped = scale.shape[-1] > 1
    group_size = own.group_size if grouped else None
    per: Per = "group" if grouped else "tensor" if scale.shape[-2] == 1 else "row"
    options: dict[str, Any] = {"group_size": group_size, "per": per, "levels": levels_of(own.rule)}
    quant = PerLayerQuant.from_trits(trits, halves, choice.name, scale_dtype="float16", **options)
    exact = PerLayerQuant.from_trits(trits, scale, choice.name, **options)
    error = 0.0 if torch.equal(halves, scale) else quant.relative_error(exact.reconstruct())
    return GgufMatrix(quant, error, was_ternary=True)
