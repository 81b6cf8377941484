"""Which packed products a GPU computes by Triton's kernels, and how they are called."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from trilens.ternary.packed.matrix import Packed, nothing_watches

__all__ = ["multiply_on_gpu", "triton_computes"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_FEW = 4  # inputs: beyond, the matrix units pay
_ROWS, _COLS = 32, 128


def triton_computes(x: Tensor, packed: Packed) -> bool:
    """Whether `multiply_on_gpu` can: Triton is installed, all is on one GPU, nothing traced."""
    return (
        x.is_cuda
        and packed.codes.device == x.device
        and x.dtype in _DTYPES
        and x.numel() > 0
        and nothing_watches()
        and importlib.util.find_spec("triton") is not None
    )


def multiply_on_gpu(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x · Ŵᵀ + b. No gradient.

    Shapes: x [..., cols]; packed [rows, cols]; bias [rows] → [..., rows], in the dtype of x

    Memory: the result.
    """
    kernels = _kernels()
    rows, cols = len(packed.codes), packed.cols
    flat = x.reshape(-1, cols).contiguous()
    # Rounded by torch at the end: Triton's interpreter, which tests this, cuts bfloat16 off.
    out = flat.new_empty(len(flat), rows, dtype=torch.float32)
    second, second_scale = packed.second_codes, packed.second_scale
    codes, scale = packed.codes.contiguous(), packed.scale.float().contiguous()
    if second is None and packed.offset is None:
        scale = scale.to(x.dtype).float()  # what rounding the weights would give
    groups = scale.shape[1]
    # A pointer that is not read still has to be one.
    parts = (
        codes,
        scale,
        codes if second is None else second.contiguous(),
        scale if second_scale is None else second_scale.float().contiguous(),
        scale if packed.offset is None else packed.offset.float().contiguous(),
        scale if bias is None else bias.contiguous(),
    )
    shape = (
        rows,
        cols,
        codes.shape[1],
        0 if scale.shape[0] == 1 else groups,
        (packed.group_size or cols) if groups > 1 else cols,
    )
    has = {
        "HAS_SECOND": second is not None,
        "HAS_OFFSET": packed.offset is not None,
        "HAS_BIAS": bias is not None,
        "ROWS": _ROWS,
        "COLS": _COLS,
    }
    n_blocks = -(-rows // _ROWS)
    if len(flat) <= _FEW:
        kernels.multiply_few[n_blocks, len(flat)](flat, out, *parts, *shape, **has)
    else:
        n_inputs = 16 if len(flat) <= 16 else 64
        grid = (n_blocks, -(-len(flat) // n_inputs))
        kernels.multiply_many[grid](flat, out, *parts, len(flat), *shape, **has, INPUTS=n_inputs)
    return out.to(x.dtype).reshape(*x.shape[:-1], rows)


@cache
def _kernels() -> ModuleType:
    return importlib.import_module("trilens.ternary.packed.gpu.kernels")
