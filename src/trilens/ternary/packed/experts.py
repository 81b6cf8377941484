"""`TernaryExperts`: the matrices of many experts, packed, in the place of a tensor of rank 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilens.ternary.packed.groups import GroupProduct, multiply_groups, multiply_groups_back
from trilens.ternary.packed.int8 import multiply_int8
from trilens.ternary.packed.matrix import Packed
from trilens.ternary.packed.module import PackedModule
from trilens.ternary.packed.multiply import multiply
from trilens.ternary.packed.operators import call_groups, call_rotate
from trilens.ternary.rotation import rotate

__all__ = ["TernaryExperts"]

# What is asked of a tensor of experts before it is multiplied. The rest is a layer's own.
_LAYOUT = ("contiguous", "data_ptr", "detach", "expand", "is_contiguous", "reshape", "stride")
_OF_TENSORS = frozenset(
    {*_LAYOUT, "view", "transpose", "permute", "mT", "chunk", "split", "unbind", "index_select"}
)


class _Groups(torch.autograd.Function):
    """Products that keep the packed weight for the backward pass, not the dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, ends: Tensor, product: GroupProduct) -> Tensor:
        ctx.packed, ctx.ends, ctx.dtype = packed, ends, x.dtype
        return multiply_groups(x, packed, ends, product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        found = multiply_groups_back(grads[0], ctx.packed, ctx.ends)
        return found.to(ctx.dtype), None, None, None


class TernaryExperts(PackedModule):
    """A packed matrix for each of n experts, two bits for each trit.

    Stands where a model has a parameter [n, out, in] (or [n, in, out], `transposed`). Called, it
    multiplies inputs that are sorted by expert. Code that indexes the parameter, or gives it to a
    function of torch, gets dense values, made at each access and of the chosen experts alone where
    it is indexed by one or several of them; they have no gradient.

    Args:
        n_experts: how many.
        in_features: length of an input.
        out_features: of an output.
        per_row: one scale or more for each row, else one for each matrix.
        group_size: weights of a row that share a scale; None for whole rows.
        has_offset: room for the offsets of the rule "asymmetric".
        has_second: room for the second plane of the rule "planes".
        transposed: the parameter is [n, in, out].
        rotated: weights and inputs are rotated by `rotation.rotate`.
        levels: 3, or 4 for the rule "quad".
        device: as for `nn.Linear`.
        dtype: of what is read as a dense tensor.
    """

    # transformers fills what a file lacks with random numbers; there is nothing to fill here.
    _is_hf_initialized = True

    def __init__(
        self,
        n_experts: int,
        in_features: int,
        out_features: int,
        *,
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
            (n_experts,),
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
        self.n_experts = n_experts

    def forward(
        self, x: Tensor | None = None, ends: Tensor | None = None, *, index: Any = None
    ) -> Tensor:
        """Each input by the matrix of its expert; without inputs, the dense matrices.

        Shapes: x [inputs, in_features], sorted by expert; ends [n_experts], where the inputs of
        each end → [inputs, out_features], in the dtype of x

        Memory: see `multiply`, one matrix at a time.
        """
        if x is None or ends is None:
            return self._read(index)
        if self.rotated:
            self.packed.check_width(x)
            x = call_rotate(x) if torch.compiler.is_compiling() else rotate(x)
        product: GroupProduct = multiply if self.activation_bits is None else multiply_int8
        if torch.compiler.is_compiling() and product is multiply:
            return call_groups(x, self.packed, ends)
        if x.requires_grad and torch.is_grad_enabled():
            found: Tensor = _Groups.apply(  # type: ignore[no-untyped-call]
                x, self.packed, ends, product
            )
            return found
        return multiply_groups(x, self.packed, ends, product)

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        """As a call; a hook that brings offloaded weights into memory is heard, no other."""
        return self._run(x, ends)

    def dense(self) -> Tensor:
        """The parameter that this stands for.

        Shapes: → [n_experts, out_features, in_features]; transposed: the last two change places

        Memory: all experts, dense.
        """
        return self._run()

    @torch.no_grad()
    def parameter(self, dtype: torch.dtype | None = None) -> nn.Parameter:
        """The parameter that this stands for, to put in its place.

        Shapes: as `dense`

        Args:
            dtype: of the parameter, made from float32; None takes the layer's own.
        """
        plain = self.unrotated(self.packed, self._like.dtype if dtype is None else torch.float32)
        plain = plain.transpose(-1, -2) if self.transposed else plain
        return nn.Parameter(plain.to(dtype or plain.dtype).contiguous())

    @torch.no_grad()
    def reconstruct(self) -> Tensor:
        """The matrices in float32. Shapes: → [n_experts, out_features, in_features]."""
        return self.unrotated(self.packed, torch.float32)

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        hooked = hasattr(self, "_hf_hook")
        found: Tensor = self(*args, **kwargs) if hooked else self.forward(*args, **kwargs)
        return found

    @torch.no_grad()
    def _read(self, index: Any) -> Tensor:
        packed = self.packed if index is None else self.packed.lead(index)
        dense = self.unrotated(packed, self._like.dtype)
        return dense.transpose(-1, -2).contiguous() if self.transposed else dense

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple):
            return self.dense()[index]
        return self._run(index=index)

    def __len__(self) -> int:
        return self.n_experts

    @property
    def shape(self) -> torch.Size:
        """Of the parameter that this stands for."""
        last = (self.out_features, self.in_features)
        return torch.Size((self.n_experts, *(last[::-1] if self.transposed else last)))

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that are read."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        """Whether the values have a gradient: no."""
        return False

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight: codes, scales and offsets."""
        return 8 * self.packed.size_bytes / math.prod(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """3."""
        return 3

    def __getattr__(self, name: str) -> Any:
        if name in _OF_TENSORS:
            return getattr(self.dense(), name)
        return super().__getattr__(name)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on dense tensors."""
        options = {key: _plain(value) for key, value in (kwargs or {}).items()}
        return func(*(_plain(arg) for arg in args), **options)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        per = "row" if self.scale.shape[-2] > 1 else "matrix"
        per = per if self.group_size is None else f"group of {self.group_size}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        rotated = ", rotated" if self.rotated else ""
        return f"{self.n_experts}, {sizes}, scale per {per}{rotated}"


def _plain(value: Any) -> Any:
    if isinstance(value, TernaryExperts):
        return value.dense()
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    return value
