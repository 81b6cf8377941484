"""BitNet checkpoints: which there are, and the weights that their packed matrices stand for.

transformers packs four trits into a byte along the rows: with r stored rows, bits 2i and 2i+1 of
stored row j are row i·r + j, plus one. Beside each packed `weight` stands one `weight_scale`. A
layer of class `autobitlinear` multiplies by it, one of class `bitlinear` divides. Both round their
input to 8 bits first, which belongs to the layer and not to its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trilens.checkpoint.scaled import decoded_headers
from trilens.errors import CorruptFileError, UsageError
from trilens.io.safetensors_header import TensorHeader

__all__ = ["BITNET", "BitNet", "PackedMatrix", "read_bitnet"]

BITNET = "bitnet"
"""What a configuration's `quant_method` calls it."""

_PER_BYTE = 4
_CLASSES = ("bitlinear", "autobitlinear")
_MODES = ("offline", "online")
_SCALES = {"F16", "BF16", "F32"}
_SCALE_SUFFIX = "_scale"


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Where a packed matrix lies, and how its scale is meant.

    Attributes:
        codes: Four trits in a byte.
        scale: One number.
        divides: The layer divides by it.
    """

    codes: TensorHeader
    scale: TensorHeader
    divides: bool

    @property
    def header(self) -> TensorHeader:
        """The weight as the model has it, with the place of its codes."""
        first, *rest = self.codes.shape
        shape = (_PER_BYTE * first, *rest)
        return TensorHeader(
            self.codes.name, "F32", shape, self.codes.file, self.codes.begin, self.codes.end
        )

    def dense(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Trits times scale: exact where the layer multiplies, else 1/scale is rounded once.

        Shapes: codes uint8 [r, in], scale [1] → float32 [4r, in]

        Raises:
            CorruptFileError: the code 3, or a scale that is no finite number other than 0.
        """
        factor = scale.float().reshape(())
        factor = 1 / factor if self.divides else factor
        if not bool(torch.isfinite(factor)) or not bool(factor):
            raise CorruptFileError(
                f"{self.scale.name} is {float(scale)}: a finite number other than 0 is needed"
            )
        trits = torch.cat([(codes >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])
        if int(trits.max()) > 1:
            raise CorruptFileError(f"{self.codes.name} holds the code 3: codes are 0, 1 or 2")
        return trits.float() * factor


@dataclass(frozen=True, slots=True)
class BitNet:
    """What a BitNet checkpoint stores.

    Attributes:
        matrices: The packed ones by name; none where weights are plain and quantized in each call.
    """

    matrices: Mapping[str, PackedMatrix] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """What a checkpoint that is made of it computes otherwise."""
        return (
            "The BitNet source rounds the input of each ternary layer to 8 bits; this one takes "
            "inputs as they are, so that outputs differ a little."
        )

    def plain_headers(self, headers: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
        """The headers as the model has its weights, without scales beside them."""
        return decoded_headers(headers, self.matrices)


def read_bitnet(
    name: str, section: Mapping[str, Any], headers: Mapping[str, TensorHeader]
) -> BitNet:
    """Find the packed matrices of a BitNet checkpoint.

    Args:
        name: of the checkpoint, for messages.
        section: its `quantization_config`.
        headers: its stored tensors.

    Raises:
        UsageError: a variant that is not known, or that does more than multiply by trits.
        CorruptFileError: codes without a scale, or a scale without codes.
    """
    kind = section.get("linear_class", _CLASSES[0])
    mode = section.get("quantization_mode", _MODES[0])
    for option, value, known in (
        ("linear_class", kind, _CLASSES),
        ("quantization_mode", mode, _MODES),
    ):
        if value not in known:
            raise UsageError(
                f"{name} is a BitNet checkpoint with {option} {value!r}: {' and '.join(known)} are "
                "known; give the checkpoint with plain weights"
            )
    if section.get("use_rms_norm"):
        raise UsageError(
            f"{name} is a BitNet checkpoint with use_rms_norm: its layers normalize their inputs, "
            "which no ternary layer of trilens does"
        )
    if mode == "online" and kind == "autobitlinear":
        return BitNet()
    scales = {n.removesuffix(_SCALE_SUFFIX): h for n, h in headers.items() if _is_scale(n)}
    codes = {n: h for n, h in headers.items() if n.endswith(".weight") and h.dtype == "U8"}
    for weight, scale in scales.items():
        if weight not in codes and weight in headers:
            raise UsageError(
                f"{name} is a BitNet checkpoint that stores {weight} as {headers[weight].dtype} "
                f"beside {scale.name}: trits packed into uint8 are known, and nothing else"
            )
        if weight not in codes:
            raise CorruptFileError(f"{name} has {scale.name}, and no {weight}")
    _check_packed(name, codes, scales)
    if not codes:
        raise UsageError(
            f"{name} is a BitNet checkpoint ({kind}, {mode}) without a packed matrix: weights of "
            "uint8 beside a weight_scale are needed"
        )
    if kind == "autobitlinear":
        _check_no_bias(name, codes, headers)
    divides = kind == "bitlinear"
    return BitNet({n: PackedMatrix(codes[n], scales[n], divides) for n in codes})


def _check_packed(
    name: str, codes: Mapping[str, TensorHeader], scales: Mapping[str, TensorHeader]
) -> None:
    """Refuse codes without a scale of one number."""
    for weight, packed in codes.items():
        if weight not in scales:
            raise CorruptFileError(f"{name} has packed trits in {weight}, and no scale for them")
        scale = scales[weight]
        if scale.dtype not in _SCALES or any(size != 1 for size in scale.shape):
            raise UsageError(
                f"{name} is a BitNet checkpoint whose {scale.name} is {scale.dtype} "
                f"{list(scale.shape)}: one floating-point number for each matrix is known"
            )
        if len(packed.shape) != 2 or 0 in packed.shape:
            raise CorruptFileError(f"{weight} has shape {list(packed.shape)}: no packed matrix")


def _check_no_bias(
    name: str, codes: Mapping[str, TensorHeader], headers: Mapping[str, TensorHeader]
) -> None:
    """Refuse biases of a class that multiplies them by the scale."""
    for weight in codes:
        if f"{weight.removesuffix('.weight')}.bias" in headers:
            raise UsageError(
                f"{name} is a BitNet checkpoint of class autobitlinear with a bias beside "
                f"{weight}: transformers multiplies such a bias by the scale, which no ternary "
                "layer of trilens does; give the checkpoint with plain weights"
            )


def _is_scale(name: str) -> bool:
    return name.endswith(f".weight{_SCALE_SUFFIX}")
