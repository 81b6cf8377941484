"""GGUF's ternary formats by the names that `ternarize` takes, and the numbers the files use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from trilens.checkpoint.format.plan import TernaryPlan
from trilens.errors import ShapeError, UsageError
from trilens.ternary.calibrated.rules import levels_of, n_planes_of
from trilens.ternary.codecs.gguf_blocks import Q2, TQ1, TQ2
from trilens.ternary.codecs.packing import Codec

__all__ = [
    "FLOAT_TYPES",
    "FORMATS",
    "ROUNDED_TYPES",
    "GgufFormat",
    "find_format",
    "fitting_plan",
    "row_spans",
    "type_bytes",
]


_ROWS_WEIGHTS = 1 << 20  # weights coded together
_DECODED = (34, 35)  # types that the gguf package decodes; it has no say on others


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

    def encode(self, trits: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The bytes of a matrix.

        Shapes: trits [rows, cols], scales [rows, cols / block] → [rows, bytes]
        """
        rows, cols = trits.shape
        packed = np.empty((rows, self.codec.size_bytes((cols,))), dtype=np.uint8)
        for first, last in row_spans(rows, cols):
            packed[first:last] = self.codec.encode(trits[first:last], scales[first:last])
        return packed

    def holds(
        self, found: NDArray[np.uint8], trits: NDArray[np.int8], scales: NDArray[np.float32]
    ) -> bool:
        """Whether bytes decode to a matrix bit for bit, by the gguf package too if it knows how.

        Shapes: found [rows, bytes], trits [rows, cols], scales [rows, cols / block]

        Raises:
            CorruptFileError: they do not decode.
        """
        return all(
            self._same(found[first:last], trits[first:last], scales[first:last])
            for first, last in row_spans(*trits.shape)
        )

    def _same(
        self, found: NDArray[np.uint8], trits: NDArray[np.int8], scales: NDArray[np.float32]
    ) -> bool:
        decoded = self.codec.decode(found, trits.shape)
        same = np.array_equal(decoded.trits, trits)
        same = same and decoded.scales is not None and np.array_equal(decoded.scales, scales)
        if not same or self.type_id not in _DECODED:
            return same
        weights = np.repeat(scales, self.block, axis=1) * trits
        by_package = dequantize(found, GGMLQuantizationType(self.type_id))
        # Compared as bits: −0 and 0 are equal as numbers.
        return np.array_equal(by_package.view(np.uint32), weights.view(np.uint32))


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

ROUNDED_TYPES: MappingProxyType[int, tuple[str, int, int]] = MappingProxyType(
    {8: ("Q8_0", 32, 34), 2: ("Q4_0", 32, 18)}
)
"""The types of rounded embeddings: number → name, weights in a block, bytes of a block."""

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
    if type_id in ROUNDED_TYPES:
        name, block, block_bytes = ROUNDED_TYPES[type_id]
        if shape[-1] % block:
            raise ShapeError(f"rows of {shape[-1]} weights do not fit {name}: blocks of {block}")
        return math.prod(shape) // block * block_bytes
    for known in FORMATS.values():
        if known.type_id == type_id:
            return known.codec.size_bytes(shape)
    return None


def row_spans(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of parts that are coded or decoded together."""
    step = max(1, _ROWS_WEIGHTS // cols)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def fitting_plan(plan: TernaryPlan, format: GgufFormat, *, packed: bool) -> TernaryPlan:
    """The plan with the float16 scales that the format stores.

    Args:
        plan: how weights are ternarized, or were.
        format: of the file.
        packed: the trits are made already; their scales are rounded.

    Raises:
        UsageError: a rule, a group size or a scale dtype that the format cannot hold.
    """
    coded = [name for name, entry in plan.matrices.items() if entry.rule != "keep"]
    each = [plan.of(""), *(plan.of(name) for name in coded)]
    for own in each:
        _check_rule(own, format)
    if plan.scale_dtype == "bfloat16" and not packed:
        raise UsageError(
            f"scale dtype 'bfloat16' does not fit {format.name}, which stores float16 scales: "
            "leave it out or pass 'float16'"
        )
    for own in each:
        _check_groups(own, format)
    # Codes lie as the format has them, whatever the plan says of a checkpoint's.
    return replace(plan, scale_dtype="float16", storage="two_bit")


def _check_rule(plan: TernaryPlan, format: GgufFormat) -> None:
    if plan.rule == "asymmetric" or n_planes_of(plan.rule) == 2:
        raise UsageError(
            f"rule {plan.rule!r} does not fit {format.name}, which stores one plane of trits and "
            "no offsets: take absmean, absmean_refit, twn or exact (quad for gguf-q2_0)"
        )
    if levels_of(plan.rule) > format.codec.levels:
        raise UsageError(
            f"rule {plan.rule!r} has four levels, and {format.name} holds three: take gguf-q2_0, "
            "or the rule exact"
        )


def _check_groups(plan: TernaryPlan, format: GgufFormat) -> None:
    if plan.group_size is not None and plan.group_size % format.block:
        raise UsageError(
            f"group size {plan.group_size} does not fit {format.name}, which stores a scale for "
            f"every {format.block} weights: take a multiple of {format.block}, or one scale per "
            "row or tensor"
        )
