"""GGUF's ternary formats by the names that `ternarize` takes, and the numbers the files use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.errors import UsageError
from trilens.ternary.codecs.gguf_blocks import Q2, TQ1, TQ2
from trilens.ternary.codecs.packing import Codec

__all__ = [
    "FLOAT_TYPES",
    "FORMATS",
    "GgufFormat",
    "check_packed",
    "find_format",
    "fitting_plan",
    "type_bytes",
]


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """One ternary format.

    Attributes:
        name: What the option `format` is given.
        codec: How trits and scales become bytes.
        type_id: The number of the tensor type in a file (`ggml_type`).
        file_type: The number that `general.file_type` holds (`llama_ftype`).
        block: Weights of a row that share a stored scale.
    """

    name: str
    codec: Codec
    type_id: int
    file_type: int
    block: int


FORMATS: MappingProxyType[str, GgufFormat] = MappingProxyType(
    {
        known.name: known
        for known in (
            GgufFormat("gguf-tq1_0", TQ1(), type_id=34, file_type=36, block=256),
            GgufFormat("gguf-tq2_0", TQ2(), type_id=35, file_type=37, block=256),
            GgufFormat("gguf-q2_0", Q2(), type_id=42, file_type=41, block=64),
        )
    }
)
"""Every ternary format by its name. Source: llama.cpp, `ggml.h` and `llama.h`."""

FLOAT_TYPES: MappingProxyType[int, tuple[str, int]] = MappingProxyType(
    {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
)
"""The types of kept tensors: number → name and bytes of a number."""


def find_format(name: str) -> GgufFormat | None:
    """The GGUF format of that name; None where it is another kind of format."""
    return FORMATS.get(name)


def type_bytes(type_id: int, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None for a type that is not known here.

    Raises:
        ShapeError: a ternary type whose blocks do not fit the rows.
    """
    if type_id in FLOAT_TYPES:
        return math.prod(shape) * FLOAT_TYPES[type_id][1]
    for known in FORMATS.values():
        if known.type_id == type_id:
            return known.codec.size_bytes(shape)
    return None


def fitting_plan(plan: TernaryPlan, format: GgufFormat) -> TernaryPlan:
    """The plan with the float16 scales that the format stores.

    Raises:
        UsageError: a rule, a group size or a scale dtype that the format cannot hold.
    """
    for own in _each(plan):
        _check_rule(own, format)
    if plan.scale_dtype == "bfloat16":
        raise UsageError(
            f"scale dtype 'bfloat16' does not fit {format.name}, which stores float16 scales: "
            "leave it out or pass 'float16'"
        )
    for own in _each(plan):
        _check_groups(own, format)
    # Codes lie as the format has them, whatever the plan says of a checkpoint's.
    return replace(plan, scale_dtype="float16", storage="two_bit")


def check_packed(plan: TernaryPlan, format: GgufFormat) -> None:
    """Refuse trits that were made by a plan whose result the format cannot hold.

    Raises:
        UsageError: two planes, offsets, or groups that are no whole number of blocks.
    """
    for own in _each(plan):
        _check_rule(own, format)
        _check_groups(own, format)


def _each(plan: TernaryPlan) -> list[TernaryPlan]:
    """The plan's general options, and those of every matrix with an entry of its own."""
    coded = [name for name, entry in plan.matrices.items() if entry.rule != "keep"]
    return [plan.of(""), *(plan.of(name) for name in coded)]


def _check_rule(plan: TernaryPlan, format: GgufFormat) -> None:
    if plan.rule in {"asymmetric", "planes"}:
        raise UsageError(
            f"rule {plan.rule!r} does not fit {format.name}, which stores one plane of trits and "
            "no offsets: take absmean, absmean_refit, twn or exact"
        )


def _check_groups(plan: TernaryPlan, format: GgufFormat) -> None:
    if plan.group_size is not None and plan.group_size % format.block:
        raise UsageError(
            f"group size {plan.group_size} does not fit {format.name}, which stores a scale for "
            f"every {format.block} weights: take a multiple of {format.block}, or one scale per "
            "row or tensor"
        )
