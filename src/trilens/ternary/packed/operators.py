"""The products with packed matrices as operators of torch, for `torch.compile` and `torch.export`.

A graph that was compiled or exported calls `trilens::multiply` and its like, and never sees how
codes are read. An exported program needs `import trilens.ternary.packed.operators`
where it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilens.ternary.packed.autocast import autocast_dtype
from trilens.ternary.packed.groups import multiply_groups, multiply_groups_back
from trilens.ternary.packed.matrix import Packed
from trilens.ternary.packed.multiply import multiply, multiply_back
from trilens.ternary.rotation import rotate, rotate_back

__all__ = ["call_groups", "call_multiply", "call_rotate"]


def call_multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`multiply` as one node of a graph, with a gradient for x and the bias.

    Shapes: x [..., cols]; packed [rows, cols]; bias [rows] → [..., rows]
    """
    # A graph runs without autocast, and holds its casts.
    bias = None if bias is None else bias.to(autocast_dtype(bias))
    found: Tensor = _multiply(x.to(autocast_dtype(x)), bias, *_parts(packed), *_options(packed))
    return found


def call_groups(x: Tensor, packed: Packed, ends: Tensor) -> Tensor:
    """`multiply_groups` as one node of a graph, with a gradient for x.

    Shapes: x [inputs, cols]; packed [groups, rows, cols]; ends [groups] → [inputs, rows]
    """
    found: Tensor = _groups(x.to(autocast_dtype(x)), ends, *_parts(packed), *_options(packed))
    return found


def call_rotate(x: Tensor) -> Tensor:
    """`rotate` as one node of a graph, with a gradient. Shapes: [..., width] → the same."""
    found: Tensor = _rotate(x, False)
    return found


def _parts(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return (
        packed.codes,
        packed.scale,
        packed.offset,
        packed.second_codes,
        packed.second_scale,
    )


def _options(packed: Packed) -> tuple[int, int | None, int]:
    return packed.cols, packed.group_size, packed.levels


def _packed(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    second_codes: Tensor | None,
    second_scale: Tensor | None,
    cols: int,
    group_size: int | None,
    levels: int = 4,
) -> Packed:
    return Packed(codes, scale, cols, group_size, offset, second_codes, second_scale, levels)


_WEIGHT = (
    "Tensor codes, Tensor scale, Tensor? offset, Tensor? second_codes, Tensor? second_scale, "
    "int cols, int? group_size, int levels=4"  # programs of before there were levels have none
)


@torch.library.custom_op(
    "trilens::multiply", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor"
)
def _multiply(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return multiply(x, _packed(*weight), bias)


@torch.library.custom_op(
    "trilens::multiply_back", mutates_args=(), schema=f"(Tensor grad, {_WEIGHT}) -> Tensor"
)
def _multiply_back(grad: Tensor, *weight: Any) -> Tensor:
    return multiply_back(grad.contiguous(), _packed(*weight))


@torch.library.custom_op(
    "trilens::multiply_groups",
    mutates_args=(),
    schema=f"(Tensor x, Tensor ends, {_WEIGHT}) -> Tensor",
)
def _groups(x: Tensor, ends: Tensor, *weight: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return multiply_groups(x, _packed(*weight), ends)


@torch.library.custom_op(
    "trilens::multiply_groups_back",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor ends, {_WEIGHT}) -> Tensor",
)
def _groups_back(grad: Tensor, ends: Tensor, *weight: Any) -> Tensor:
    return multiply_groups_back(grad.contiguous(), _packed(*weight), ends)


@torch.library.custom_op(
    "trilens::rotate", mutates_args=(), schema="(Tensor x, bool back) -> Tensor"
)
def _rotate(x: Tensor, back: bool) -> Tensor:
    return (rotate_back(x) if back else rotate(x)).contiguous()


@_rotate.register_fake
def _same_shape(x: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


@_multiply.register_fake
def _shape(x: Tensor, _bias: Tensor | None, codes: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@_multiply_back.register_fake
def _shape_back(grad: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight[5]))


@_groups.register_fake
def _groups_shape(x: Tensor, _ends: Tensor, codes: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[1]))


@_groups_back.register_fake
def _groups_shape_back(grad: Tensor, _ends: Tensor, *weight: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], weight[5]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the gradient of x needs: the packed weight, and not x."""
    kept = inputs[1:]
    ctx.dtype = inputs[0].dtype
    ctx.is_tensor = [isinstance(value, Tensor) for value in kept]
    ctx.options = [value for value in kept if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))


def _recall(ctx: Any) -> list[Any]:
    tensors, options = iter(ctx.saved_tensors), iter(ctx.options)
    return [next(tensors) if there else next(options) for there in ctx.is_tensor]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bias, *weight = _recall(ctx)
    by_x = _multiply_back(grad, *weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    by_bias = None
    if bias is not None and ctx.needs_input_grad[1]:
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return by_x, by_bias, *[None] * len(weight)


def _groups_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept = _recall(ctx)
    return _groups_back(grad, *kept).to(ctx.dtype), *[None] * len(kept)


def _remember_way(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.back = inputs[1]


def _rotate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _rotate(grad, not ctx.back), None


_rotate.register_autograd(_rotate_gradients, setup_context=_remember_way)
_multiply.register_autograd(_gradients, setup_context=_remember)
_groups.register_autograd(_groups_gradients, setup_context=_remember)
