"""Products of inputs that are rounded to 8 bits: an option, for it changes the result.

Each token's inputs are divided by its largest magnitude / 127 and rounded to whole numbers. Their
products with trits are sums of whole numbers, exact in any order and equal on every processor; the
scales, of the groups and of the token, come last, in float32, whose roundings depend on the order.
An input is off by at most 1/254 of the largest one of its token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trilens.ternary.codecs.rows import unpack_rows
from trilens.ternary.packed.autocast import cast_as_autocast
from trilens.ternary.packed.cpu.native import multiply_int8_native, native_multiplies_int8
from trilens.ternary.packed.matrix import Packed, by_address

__all__ = ["multiply_int8", "round_inputs"]

_WORTH_A_THREAD = 1 << 20  # weights times inputs
_EXACT = 1 << 24  # whole numbers of float32
_AT_ONCE = 1 << 22  # numbers of a tile
_LIFT = 2.0**64  # inputs of a token that are all below 1 / this are multiplied by it first
_LEAST = 2.0**-149 * _LIFT  # of float32, so lifted


def multiply_int8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x · Ŵᵀ + b, with x rounded to 8 bits for each token. No gradient.

    Shapes: x [..., cols]; packed [rows, cols]; bias [rows] → [..., rows], in the dtype of x (under
    autocast in autocast's)

    Memory: float32 outputs, int8 inputs; without the library of the package 16 MB or more.

    Raises:
        ShapeError: x is not [..., cols].
    """
    packed.check_width(x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, bias = cast_as_autocast(x, bias)
        # It would round the whole numbers.
        with torch.autocast(kind, enabled=False):
            return multiply_int8(x, packed, bias)
    flat = x.reshape(-1, packed.cols)
    rounded, factors, powers = round_inputs(flat)
    if flat.shape[0] and by_address(rounded, packed) and native_multiplies_int8(packed):
        n_threads = 1 + rounded.numel() * packed.codes.shape[0] // _WORTH_A_THREAD
        out = multiply_int8_native(rounded, factors, packed, n_threads)
    else:
        out = _plain(rounded, packed) * factors[:, None]
    out *= powers[:, None]
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


def round_inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers, and by which two numbers, one after the other, to multiply what they give.

    Shapes: x [tokens, cols] → int8 [tokens, cols]; float32 [tokens]; float32 [tokens]

    Returns:
        Numbers from −127 to 127, ties to even; factors; and powers of two, 1 but for tokens so
        small that their factor would lose bits. Where an input is not finite, the factor is not.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(len(x), 1)
    # 127 / largest is not finite below 2⁻¹²¹, and denormal factors lack bits: 2⁶⁴ times as large.
    lift = torch.where(largest < 1 / _LIFT, _LIFT, 1.0)
    largest = largest * lift
    steps = 127 / largest.clamp_min(_LEAST)
    rounded = (wide * lift).mul_(steps).round_().nan_to_num_(0.0, 127.0, -127.0).clamp_(-127, 127)
    return rounded.to(torch.int8), (largest / 127)[:, 0], (1 / lift)[:, 0]


def _plain(rounded: Tensor, packed: Packed) -> Tensor:
    """Shapes: int8 [inputs, cols] → float32 [inputs, rows]."""
    size = packed.cols if packed.scale.shape[-1] == 1 else packed.group_size or packed.cols
    # products of numbers up to 127 · 2, summed up: exact in float32 up to 2²⁴
    dtype = torch.float32 if 254 * size <= _EXACT else torch.float64
    x = _grouped(rounded.to(dtype), size)
    n_groups = x.shape[0]
    step = max(1, _AT_ONCE // max(1, rounded.shape[0] * n_groups, packed.cols))
    tiles = [
        _tile(x, packed.rows(start, min(start + step, packed.codes.shape[0])), size)
        for start in range(0, packed.codes.shape[0], step)
    ]
    return torch.cat(tiles, -1) if tiles else rounded.new_zeros(len(rounded), 0).float()


def _tile(x: Tensor, packed: Packed, size: int) -> Tensor:
    planes = [(packed.codes, packed.scale)]
    if packed.second_codes is not None and packed.second_scale is not None:
        planes.append((packed.second_codes, packed.second_scale))
    out = x.new_zeros(x.shape[1], packed.codes.shape[0], dtype=torch.float32)
    for codes, scale in planes:
        trits = _grouped(unpack_rows(codes, packed.cols, x.dtype), size)
        sums = torch.bmm(x, trits.mT).float()  # [groups, inputs, rows]
        out += (sums * scale.T[:, None, :]).sum(0)
    if packed.offset is not None:
        out += (x.sum(-1).float()[..., None] * packed.offset.T[:, None, :]).sum(0)
    return out


def _grouped(values: Tensor, size: int) -> Tensor:
    """Shapes: [n, cols] → [groups, n, size]."""
    padded = functional.pad(values, (0, -values.shape[-1] % size))
    return padded.reshape(len(values), padded.shape[-1] // size, size).transpose(0, 1)
