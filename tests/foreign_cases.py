"""Layers and tensors as quantizers make them, small enough to be read at a glance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EightBit", "FourBit", "Scaled", "eight_bit"]


class EightBit(Tensor):
    """A weight of one byte and a scale for each row, without a storage of its own."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> EightBit:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return EightBit(args[0].codes, args[0].scale)
        plain = [a.dequantize() if isinstance(a, EightBit) else a for a in args]
        return func(*plain, **(kwargs or {}))


def eight_bit(weight: Tensor) -> EightBit:
    """The weight rounded to 255 levels in each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return EightBit((weight / scale).round().to(torch.int8), scale)


class Scaled(nn.Linear):
    """A linear layer that scales its output, as BitNet's does."""

    def __init__(self, n_in: int, n_out: int, factor: float) -> None:
        super().__init__(n_in, n_out)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * nn.functional.linear(x, self.weight) + self.bias


class FourBit(nn.Linear):
    """A linear layer that keeps two weights in a byte, in one column, as bitsandbytes does."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False)
        weight = dense.weight.detach()
        self.step = float(weight.abs().max()) / 7
        codes = ((weight / self.step).round() + 8).to(torch.uint8).reshape(-1, 2)
        packed = (codes[:, :1] << 4) | codes[:, 1:]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dense(self) -> Tensor:
        codes = torch.cat([self.weight >> 4, self.weight & 15], dim=1).float() - 8
        return codes.reshape(self.out_features, self.in_features) * self.step

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype))
