"""`TernaryLinear`: a linear layer whose weight stays packed, two bits for each trit.

A packed matrix is a few tensors (`Packed`): the codes 1 + t, four to a byte along each row, lowest
bits first, and one scale per matrix, row or group of a row. `multiply` computes with it and never
unpacks the whole matrix; the result is that of the dense layer, which would hold `Packed.dense`,
but for the order in which sums are taken; with two planes or an offset, a few inputs meet weights
that are not rounded to the layer's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from trilens.errors import ShapeError
from trilens.ternary.packed.int8 import multiply_int8
from trilens.ternary.packed.matrix import PARTS, Packed
from trilens.ternary.packed.module import PackedModule
from trilens.ternary.packed.multiply import multiply, multiply_back
from trilens.ternary.packed.operators import call_multiply, call_rotate
from trilens.ternary.packed.read_only import ReadOnlyWeight
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate

__all__ = ["PARTS", "Packed", "TernaryLinear"]


Product: TypeAlias = Callable[[Tensor, Packed, Tensor | None], Tensor]


class _Multiply(torch.autograd.Function):
    """x · Wᵀ that keeps the packed weight for the backward pass, not the dense one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed, product: Product
    ) -> Tensor:
        ctx.packed, ctx.dtype = packed, x.dtype
        return product(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        to_x, to_bias, *_ = ctx.needs_input_grad
        # Under autocast the gradient comes in another dtype than the input had.
        by_x = multiply_back(grad, ctx.packed).to(ctx.dtype) if to_x else None
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None
        return by_x, by_bias, None, None


class TernaryLinear(PackedModule):
    """A linear layer with a packed ternary weight: y = x · Ŵᵀ + b.

    Stands in for `nn.Linear`, and for transformers' transposed `Conv1D`, whose weight is held as
    [out, in] here. The packed parts are parameters without a gradient: the input and the bias have
    one. `.to(dtype)` and `.half()` change what the layer computes in, never codes and scales.

    Args:
        in_features: length of the input's last dimension.
        out_features: of the output's.
        bias: whether a bias is added.
        per_row: one scale or more for each row, else one for the matrix.
        group_size: weights of a row that share a scale; None for whole rows.
        has_offset: room for the offsets of the rule "asymmetric".
        has_second: room for the second plane of the rule "planes".
        transposed: the layer stands in for one that holds its weight as [in, out].
        rotated: weight and input are rotated by `rotation.rotate`.
        levels: 3, or 4 for the rule "quad", whose code 3 is the level 2.
        device: as for `nn.Linear`.
        dtype: of the bias, and of `weight`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        per_row: bool = False,
        group_size: int | None = None,
        has_offset: bool = False,
        has_second: bool = False,
        transposed: bool = False,
        rotated: bool = False,
        levels: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (),
            in_features,
            out_features,
            per_row=per_row,
            group_size=group_size,
            has_offset=has_offset,
            has_second=has_second,
            transposed=transposed,
            rotated=rotated,
            levels=levels,
            device=device,
            dtype=dtype,
        )
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_quant(
        cls,
        quant: PerLayerQuant,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        rotated: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A layer that computes with a quantized matrix.

        Shapes: quant [out_features, in_features]; bias [out_features]

        Args:
            quant: the quantized matrix; of a Conv1D, quantize the transposed weight.
            bias: copied, in `dtype`.
            transposed: see the class.
            rotated: see the class.
            dtype: of the bias, and of `weight`.

        Raises:
            ShapeError: not a matrix, or a bias of another length.
        """
        packed = Packed.of(quant)
        rows, cols = quant.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ShapeError(f"bias has shape {tuple(bias.shape)}: the layer needs ({rows},)")
        layer = cls(
            cols,
            rows,
            bias=bias is not None,
            per_row=quant.per != "tensor",
            group_size=quant.group_size,
            has_offset=quant.offset is not None,
            has_second=quant.second_trits is not None,
            transposed=transposed,
            rotated=rotated,
            levels=quant.levels,
            dtype=dtype,
        )
        for name, part in packed.parts.items():
            getattr(layer, name).data.copy_(part)
        if bias is not None and layer.bias is not None:
            layer.bias.data.copy_(bias.detach())
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight as the replaced layer would hold it, unpacked anew at each access.

        For code that reads a layer's weight instead of calling it. Without a gradient; writing into
        it is a `UsageError`.

        Shapes: [out_features, in_features]; transposed: [in_features, out_features]
        """
        with torch.no_grad():
            dense = self.unrotated(self.packed, self._like.dtype)
        return (dense.T if self.transposed else dense).as_subclass(ReadOnlyWeight)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight: codes, scales and offsets."""
        return 8 * self.packed.size_bytes / (self.in_features * self.out_features)

    def reconstruct(self) -> Tensor:
        """The weight in float32, in the orientation of the replaced layer.

        Memory: 4 bytes per weight.
        """
        with torch.no_grad():
            dense = self.unrotated(self.packed, torch.float32)
        return dense.T if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Shapes: x [..., in_features] → [..., out_features], in the dtype of x

        Memory: see `multiply`: two megabytes, and what a few inputs are prepared to.
        """
        is_compiling = torch.compiler.is_compiling()
        if self.rotated:
            self.packed.check_width(x)
            x = call_rotate(x) if is_compiling else rotate(x)
        bias = self.bias
        product = multiply if self.activation_bits is None else multiply_int8
        if is_compiling and product is multiply:
            return call_multiply(x, self.packed, bias)
        wants = x.requires_grad or (bias is not None and bias.requires_grad)
        if wants and torch.is_grad_enabled():
            found: Tensor = _Multiply.apply(  # type: ignore[no-untyped-call]
                x, bias, self.packed, product
            )
            return found
        return product(x, self.packed, bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        scales = "row" if self.scale.shape[0] > 1 else "matrix"
        per = scales if self.group_size is None else f"group of {self.group_size}"
        rotated = ", rotated" if self.rotated else ""
        rotated += ", four levels" if self.levels == 4 else ""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, scale per {per}{rotated}"
