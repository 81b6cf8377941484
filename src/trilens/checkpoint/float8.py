"""Checkpoints with float8 weights: which there are, and the weights that they stand for.

A float8 `weight` stands beside its scale, `weight_scale_inv` (method "fp8") or `weight_scale`
("compressed-tensors", format "float-quantized"): one number for the matrix, for each row, or for
each block of it, by which the weight is multiplied. Every float8 value is exact in float32, so what
is decoded is what the layer multiplies by. Such layers also round their input to float8, which
belongs to the layer and not to its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilens.checkpoint.scaled import decoded_headers
from trilens.errors import CorruptFileError, UsageError
from trilens.io.safetensors_header import TensorHeader

__all__ = ["FLOAT8_DTYPES", "Float8", "Float8Matrix", "is_float8", "read_float8"]

FLOAT8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Names in files → torch's."""

_SUFFIXES = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}
_COMPRESSED = "float-quantized"
_SCALES = {"F16", "BF16", "F32"}


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """Where a float8 matrix lies, and its scales.

    Attributes:
        codes: The matrix.
        scale: Its scales.
        block: Rows and columns that share a scale.
    """

    codes: TensorHeader
    scale: TensorHeader
    block: tuple[int, int]

    @property
    def header(self) -> TensorHeader:
        """The weight as the model has it, with the place of its codes."""
        stored = self.codes
        return TensorHeader(stored.name, "F32", stored.shape, stored.file, stored.begin, stored.end)

    def dense(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes times scales, rounded once to float32.

        Shapes: codes float8 [out, in], scale [blocks of rows, blocks of columns] → [out, in]

        Raises:
            CorruptFileError: a scale that is not finite.
        """
        if not bool(torch.isfinite(scale.float()).all()):
            raise CorruptFileError(f"{self.scale.name} holds NaN or Inf: scales are finite")
        rows, cols = codes.shape
        grid = scale.float().reshape(math.ceil(rows / self.block[0]), -1)
        by_row = grid.repeat_interleave(self.block[0], dim=0)[:rows]
        return codes.float() * by_row.repeat_interleave(self.block[1], dim=1)[:, :cols]


@dataclass(frozen=True, slots=True)
class Float8:
    """What a float8 checkpoint stores.

    Attributes:
        matrices: The float8 ones by name.
        suffix: What the names of scales end in.
    """

    matrices: Mapping[str, Float8Matrix]
    suffix: str

    @property
    def note(self) -> str:
        """What a checkpoint that is made of it computes otherwise."""
        return (
            "The float8 source rounds the input of each of its layers to float8; this one takes "
            "inputs as they are, so that outputs differ a little."
        )

    def plain_headers(self, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
        """The headers as the model has its weights, without scales beside them."""
        weights = decoded_headers(headers, self.matrices)
        inputs = (".input_scale", ".activation_scale")
        return {name: header for name, header in weights.items() if not name.endswith(inputs)}


def is_float8(section: Any) -> bool:
    """Whether a configuration's `quantization_config` is of a float8 checkpoint known here."""
    if not isinstance(section, Mapping):
        return False
    method = section.get("quant_method")
    return method == "fp8" or (
        method == "compressed-tensors" and section.get("format") == _COMPRESSED
    )


def read_float8(
    name: str, section: Mapping[str, Any], headers: Mapping[str, TensorHeader]
) -> Float8:
    """Find the float8 matrices of a checkpoint.

    Args:
        name: of the checkpoint, for messages.
        section: its `quantization_config`.
        headers: its stored tensors.

    Raises:
        UsageError: a layout that is not known.
        CorruptFileError: a matrix without a scale, or scales that do not fit it.
    """
    suffix = _SUFFIXES[str(section["quant_method"])]
    found = {}
    for weight, codes in headers.items():
        if not codes.dtype.startswith("F8_"):
            continue
        if codes.dtype not in FLOAT8_DTYPES or len(codes.shape) != 2:
            raise UsageError(
                f"{name} stores {weight} as {codes.dtype} {list(codes.shape)}: matrices of "
                f"{' or '.join(FLOAT8_DTYPES)} are known; give the checkpoint with plain weights"
            )
        scale = headers.get(weight + suffix)
        if scale is None:
            raise CorruptFileError(
                f"{name} has float8 weights in {weight}, and no {weight}{suffix}"
            )
        block = _block(name, codes, scale, section.get("weight_block_size"))
        found[weight] = Float8Matrix(codes, scale, block)
    if not found:
        raise UsageError(f"{name} is a float8 checkpoint without a float8 matrix")
    return Float8(found, suffix)


def _block(name: str, codes: TensorHeader, scale: TensorHeader, stated: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, cols = codes.shape
    count = math.prod(scale.shape)
    known = scale.dtype in _SCALES
    if known and count == 1:
        return rows, cols
    if known and scale.shape in {(rows,), (rows, 1)}:
        return 1, cols
    if known and isinstance(stated, list | tuple) and len(stated) == 2:
        block = int(stated[0]), int(stated[1])
        if min(block) > 0 and scale.shape == tuple(
            math.ceil(size / each) for size, each in zip((rows, cols), block, strict=True)
        ):
            return block
    raise UsageError(
        f"{name} has the scales {scale.name}, {scale.dtype} {list(scale.shape)}, beside weights "
        f"{[rows, cols]} (weight_block_size {stated}): one number for the matrix, each row or each "
        "block is known; give the checkpoint with plain weights"
    )
