"""How values are stored: in a float dtype, or as int8 with one scale per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.errors import NonFiniteError

__all__ = ["SCALE", "CodingError", "decoded", "stored_dtype", "written_values"]

SCALE = ".scale"
"""What follows a tensor's name in the name of its scales."""

_LEVELS = 127.0
_FLOATS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}


@dataclass(slots=True)
class CodingError:
    """Sums from which the relative error ‖x − x̂‖² / ‖x‖² is made."""

    error: float = 0.0
    total: float = 0.0

    def add(self, values: Tensor, found: Tensor) -> None:
        """Take in values and what is read back of them."""
        # PROMOTE: sums over a shard drift in float32.
        exact = values.double()
        self.error += float((exact - found.double()).square().sum())
        self.total += float(exact.square().sum())


def stored_dtype(option: str, values: torch.dtype) -> torch.dtype:
    """The dtype of an option, for values of this dtype."""
    if option != "auto":
        return _FLOATS[option]
    return values if values in _FLOATS.values() else torch.float32


def written_values(
    values: Tensor, codes: Tensor, scales: Tensor | None, error: CodingError | None
) -> None:
    """Write values into their place in a shard.

    Shapes: values, codes [tokens, …]; scales float32 [tokens], for int8 alone

    Raises:
        NonFiniteError: a value that the dtype cannot hold.
    """
    if scales is None:
        codes.copy_(values)
        if codes.dtype == torch.float16 and bool((codes.isinf() & values.isfinite().cpu()).any()):
            raise NonFiniteError(
                f"float16 holds numbers up to 65504, and a value is {float(values.abs().max()):g}: "
                "store as bfloat16 or float32"
            )
        if error is not None:
            error.add(values, codes)
        return
    flat = values.reshape(len(values), -1).float()
    largest = flat.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise NonFiniteError("int8 cannot hold NaN or Inf, and a value is: store as bfloat16")
    scales.copy_(torch.where(largest > 0, largest / _LEVELS, 1.0))
    rounded = torch.round(flat / scales.to(flat.device)[:, None]).clamp(-_LEVELS, _LEVELS)
    codes.copy_(rounded.to(torch.int8).reshape(values.shape))
    if error is not None:
        error.add(flat, decoded(codes.reshape(len(codes), -1), scales).to(flat.device))


def decoded(codes: Tensor, scales: Tensor | None) -> Tensor:
    """Values of a shard: as they are stored, or float32 of int8."""
    if scales is None:
        return codes
    return codes.float() * scales.reshape(-1, *[1] * (codes.dim() - 1))
