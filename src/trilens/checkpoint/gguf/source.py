"""A checkpoint to be exported: one with plain weights, or one that `ternarize` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from trilens.checkpoint.format.names import find_parts
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TensorReport
from trilens.checkpoint.format.skeleton import Choice, build_skeleton, choose
from trilens.checkpoint.source import Checkpoint
from trilens.checkpoint.validation import validate
from trilens.errors import UsageError, ValueRangeError
from trilens.io.safetensors_header import TensorHeader
from trilens.models.loading import load_tokenizer
from trilens.ternary.codecs.rows import expand_rows, unpack_rows
from trilens.ternary.granularity import Per
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.rules import RuleName

__all__ = ["GgufMatrix", "GgufSource", "open_source"]

_KNOWN_SETTINGS = frozenset(
    {
        "quant_method",
        "format_version",
        "rule",
        "per",
        "group_size",
        "layers",
        "merged",
        "overrides",
        "storage",
        "experts",
    }
)
_EVERYTHING = TernaryPlan()


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


class GgufSource:
    """What an export reads: configuration, tokenizer, headers, and tensors one by one.

    Attributes:
        name: What errors and the file call it.
        config: transformers' configuration.
        tokenizer: transformers' tokenizer, or None.
        tensor: A stored tensor by its name.
        check_unchanged: Refuse files that changed since they were opened.
        model: The skeleton.
        headers: Every tensor; of a ternary checkpoint as it was before.
        choices: What is to become of each.
        plan: How the weights were ternarized; None for dense weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        folder, name = checkpoint.folder, checkpoint.name
        self.name = folder.name if Path(name) == folder else name
        self.config = checkpoint.config
        self.tokenizer = load_tokenizer(folder, trusted=False)
        self.tensor = checkpoint.tensor
        self.check_unchanged = checkpoint.check_unchanged
        self._stored = checkpoint.headers
        self._packed: dict[str, TensorReport] = {}
        self.plan: TernaryPlan | None = None
        self.headers: Mapping[str, TensorHeader] = self._stored
        settings = checkpoint.settings.get("quantization_config")
        if settings is not None:
            _check_settings(settings, self.name)
            report = validate(folder)
            self.plan = report.plan
            self._packed = {tensor.name: tensor for tensor in report.coded}
            self.headers = {t.name: self._header_before(t) for t in report.tensors}
        self.model: Any = build_skeleton(self.config, self.headers)
        self.choices = tuple(map(self._as_stored, choose(self.model, self.headers)))

    def matrix(self, choice: Choice, plan: TernaryPlan) -> GgufMatrix:
        """A matrix as trits: coded by the plan, or the trits that are there.

        Raises:
            NonFiniteError: NaN or Inf among the weights.
            ValueRangeError: a scale that float16 does not hold.

        Memory: 1 byte per weight, plus what the rule needs.
        """
        if choice.name in self._packed:
            return self._unpacked(choice)
        stored = self.tensor(choice.name)
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
        return GgufMatrix(quant, quant.relative_error(matrix), quant.was_ternary)

    def _unpacked(self, choice: Choice) -> GgufMatrix:
        report = self._packed[choice.name]
        parts = find_parts(report.packed_as, self._stored)
        codes, scale = (self.tensor(parts[part]) for part in ("codes", "scale"))
        cols = report.shape[0 if choice.transposed else 1]
        own = None if self.plan is None else self.plan.of(choice.name)
        compact = own is not None and own.storage == "compact"
        trits = expand_rows(codes, cols) if compact else unpack_rows(codes, cols)
        scale = scale.float()  # in compact checkpoints of their own dtype
        halves = scale.half().float()
        if not bool(torch.isfinite(halves).all()):
            raise ValueRangeError(
                f"scale {float(scale.abs().max()):g} of {choice.name!r} is beyond float16, which "
                "GGUF stores: at most 65504"
            )
        grouped = scale.shape[-1] > 1
        group_size = own.group_size if own is not None and grouped else None
        per: Per = "group" if grouped else "tensor" if scale.shape[-2] == 1 else "row"
        quant = PerLayerQuant.from_trits(
            trits, halves, choice.name, group_size=group_size, per=per, scale_dtype="float16"
        )
        exact = PerLayerQuant.from_trits(trits, scale, choice.name, group_size=group_size, per=per)
        error = 0.0 if torch.equal(halves, scale) else quant.relative_error(exact.reconstruct())
        return GgufMatrix(quant, error, was_ternary=True)

    def _header_before(self, tensor: TensorReport) -> TensorHeader:
        """The header that a tensor had before it was packed; its place says nothing."""
        if tensor.outcome == "kept":
            return self._stored[tensor.name]
        parts = find_parts(tensor.packed_as, self._stored)
        file = self._stored[parts["codes"]].file
        return TensorHeader(tensor.name, "F32", tensor.shape, file, 0, tensor.size_bytes_before)

    def _as_stored(self, choice: Choice) -> Choice:
        """Of a ternary checkpoint: what is kept there is kept here."""
        if self.plan is None or choice.name in self._packed or choice.storage == "kept":
            return choice
        return replace(choice, storage="kept", reason="kept in the ternary checkpoint")


def open_source(
    src: str | os.PathLike[str], plan: TernaryPlan, *, revision: str | None
) -> GgufSource:
    """Find and read a checkpoint.

    Args:
        src: directory or hub id.
        plan: what the caller asked; a checkpoint that is ternary already takes no orders.
        revision: of a hub id.

    Raises:
        UsageError: quantized by something else, or a plan for weights that are trits already.
        LoadError: the source cannot be read, or is damaged; see `trilens.errors`.
    """
    checkpoint = Checkpoint.open(src, revision=revision, ternary=True)
    source = GgufSource(checkpoint)
    if source.plan is not None and plan != _EVERYTHING:
        raise UsageError(
            f"{checkpoint.name} is ternary already, and its trits are kept as they are: leave out "
            "the rule and every other option of the plan, or give the checkpoint with plain weights"
        )
    return source


def _check_settings(settings: dict[str, Any], name: str) -> None:
    given = {key for key, value in settings.items() if value is not None}
    unknown = sorted(given - _KNOWN_SETTINGS)
    if unknown:
        raise UsageError(
            f"{name} was ternarized with {unknown[0]!r}, which no GGUF file can hold: give the "
            "checkpoint with plain weights"
        )
