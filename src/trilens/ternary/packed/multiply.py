"""x · Ŵᵀ from packed codes, without ever unpacking the whole matrix.

Where the library that is built with the package computes (`cpu.native`: bfloat16 on processors
that multiply it), it takes the codes as they are, up to some hundred inputs, with matrix units any
number. Elsewhere numba's loops help:

Few inputs (`looked_up`): the codes themselves pick prepared sums of inputs; sums are float32.
Many inputs (`tiled`): some hundred rows are unpacked to what a dense layer would hold, and
multiplied by torch, then the next ones. Both compute with the matrix that `Packed.dense` gives for
the dtype of the input (with two planes or an offset `looked_up` leaves out its last rounding).

On a GPU with Triton its kernels do both (`gpu`).

What has no codes to read by address (other devices, traced or batched tensors) and what is too
small to wait for a compiler is unpacked whole: the dense layer's result, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilens.errors import ShapeError
from trilens.ternary.packed.autocast import cast_as_autocast
from trilens.ternary.packed.cpu.native import (
    multiply_native,
    native_computes,
    native_reads,
    unpack_native,
)
from trilens.ternary.packed.cpu.thread_pool import find_loop, make_job, methods, run_job
from trilens.ternary.packed.gpu.dispatch import multiply_on_gpu, triton_computes
from trilens.ternary.packed.matrix import Packed, by_address

__all__ = ["multiply", "multiply_back"]

_WORTH_PACKED = 1 << 18  # weights: below, torch is done before the compiled code is loaded
_WORTH_A_THREAD = 1 << 19  # weights times inputs
_TILE_BYTES = 1 << 21  # stays in the cache between unpacking and multiplying
_MANY, _TALLER = 128, 4  # inputs for which a tile is larger, so that they are read less often
_LOOKUP_INPUTS = {"pairs": 12, "singles": 8, "any": 5}
"""Up to how many inputs the codes are looked up: beyond, tiles are faster."""

_SMALLEST = 64  # rows that the compiled loop takes at a time
_LARGEST_SUM = 2.0**126
_ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_DTYPES = frozenset({*_ROUNDING, torch.float64})


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x · Ŵᵀ + b. No gradient.

    Shapes: x [..., cols]; packed [rows, cols]; bias [rows] → [..., rows], in the dtype of x (under
    autocast in autocast's)

    Memory: 2 MB, 8 MB with more than 128 inputs; and a copy of the inputs, or 32 bytes for each
        number in up to 12 of them. A quarter of a megabyte is kept for the next product.

    Raises:
        ShapeError: x is not [..., cols].
    """
    packed.check_width(x)
    on_gpu = triton_computes(x, packed)
    if not on_gpu and not (_worth_reading(x, packed) and _can_be_added(bias, packed)):
        return functional.linear(x, packed.dense(x.dtype), bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, bias = cast_as_autocast(x, bias)
        with torch.autocast(kind, enabled=False):
            return multiply(x, packed, bias)
    if on_gpu:
        return multiply_on_gpu(x, packed, bias)
    if native_computes(x, packed):
        n_threads = 1 + x.numel() * packed.codes.shape[0] // _WORTH_A_THREAD
        return multiply_native(x, packed, bias, n_threads)
    flat = x.reshape(-1, packed.cols)
    method = _method(flat, packed)
    out = _tiled(flat, packed, bias) if method is None else _looked_up(flat, packed, method)
    if method is not None:
        if bias is not None:
            out += bias
        out = out.to(x.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def multiply_back(grad: Tensor, packed: Packed) -> Tensor:
    """The gradient of `multiply` with respect to x: grad · Ŵ.

    Shapes: grad [..., rows]; packed [rows, cols] → [..., cols], in the dtype of grad

    Raises:
        ShapeError: grad is not [..., rows].
    """
    rows = packed.codes.shape[0]
    if grad.shape[-1:] != (rows,):
        raise ShapeError(f"gradients have shape {tuple(grad.shape)}: the layer has [..., {rows}]")
    if not _worth_reading(grad, packed):
        return grad @ packed.dense(grad.dtype)
    # PROMOTE: tiles of rows are summed up, and each sum would be rounded in half precision
    wide = torch.promote_types(grad.dtype, torch.float32)
    flat = grad.reshape(-1, grad.shape[-1]).to(wide)
    out = flat.new_zeros(len(flat), packed.cols)
    with torch.autocast("cpu", enabled=False):
        for start, stop in _tiles(packed, wide, len(flat)):
            tile = _unpacked(packed, start, stop, grad.dtype, wide)
            out = out.addmm_(flat[:, start:stop], tile)
    return out.to(grad.dtype).reshape(*grad.shape[:-1], packed.cols)


def _worth_reading(x: Tensor, packed: Packed) -> bool:
    return (
        packed.codes.shape[0] * packed.cols >= _WORTH_PACKED
        and x.dtype in _DTYPES
        and by_address(x, packed)
    )


def _can_be_added(bias: Tensor | None, packed: Packed) -> bool:
    """Whether the bias is read as it is; of another shape or device, torch knows what it means."""
    return bias is None or (bias.shape == packed.codes.shape[:1] and bias.is_cpu)


def _readable(packed: Packed) -> bool:
    """Whether compiled loops can read the parts: groups of whole words, contiguous, float32."""
    size = packed.group_size
    parts = (packed.scale, packed.second_scale, packed.offset)
    return (
        (size is None or size % 16 == 0 or size >= packed.cols)
        and packed.codes.is_contiguous()
        and (packed.second_codes is None or packed.second_codes.is_contiguous())
        and all(p is None or (p.is_contiguous() and p.dtype == torch.float32) for p in parts)
    )


def _method(flat: Tensor, packed: Packed) -> str | None:
    """How to look codes up; None where tiles are better."""
    if flat.dtype == torch.float64 or not 0 < len(flat) <= max(_LOOKUP_INPUTS.values()):
        return None
    if len(packed.codes) < _SMALLEST or not _readable(packed):
        return None
    # Sums that are looked up are scaled at the end, and could overflow before.
    if flat.dtype != torch.float16 and float(flat.abs().amax()) * packed.cols >= _LARGEST_SUM:
        return None
    found = methods()
    return found[0] if found and len(flat) <= _LOOKUP_INPUTS[found[0]] else None


def _looked_up(flat: Tensor, packed: Packed, method: str) -> Tensor:
    """Shapes: flat [inputs, cols] → float32 [inputs, rows]."""
    n_inputs, cols = flat.shape
    rows, words = len(packed.codes), -(-cols // 16)
    out = flat.new_empty(n_inputs, rows, dtype=torch.float32)
    job = _job(packed, 0 if _is_sum(packed) else _ROUNDING[flat.dtype])
    job |= {"batch": n_inputs, "out": out.data_ptr(), "cols": cols}
    x = flat.float().contiguous().resolve_neg()
    if method == "pairs":
        # one vector longer than needed, to begin where a line of the cache does
        prepared = x.new_empty(n_inputs * words * 128 + 16)
        job["inputs"] = prepared.data_ptr() + 63 & ~63
        job["input_bytes"] = 512 * words
        job["x"] = x.data_ptr()
    else:
        prepared = functional.pad(x, (0, 16 * words - cols)) if cols % 16 else x
        job["inputs"] = prepared.data_ptr()
        job["input_bytes"] = 64 * words
    made = make_job(job)
    if method == "pairs":
        run_job(find_loop("prepare_pairs"), made)
    run_job(find_loop(f"multiply_{method}"), made, 1 + n_inputs * rows * cols // _WORTH_A_THREAD)
    if packed.offset is not None:
        size = packed.group_size or cols
        by_group = functional.pad(x, (0, -cols % size)).reshape(n_inputs, -1, size).sum(-1)
        out += by_group @ packed.offset.T
    return out


def _tiled(flat: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Shapes: flat [inputs, cols] → [inputs, rows]."""
    out = flat.new_empty(len(flat), len(packed.codes))
    for start, stop in _tiles(packed, flat.dtype, len(flat)):
        tile = _unpacked(packed, start, stop, flat.dtype, flat.dtype)
        part = None if bias is None else bias[start:stop]
        out[:, start:stop] = functional.linear(flat, tile, part)
    return out


def _tiles(packed: Packed, dtype: torch.dtype, n_inputs: int) -> list[tuple[int, int]]:
    rows = len(packed.codes)
    tile_bytes = _TILE_BYTES * (_TALLER if n_inputs > _MANY else 1)
    step = max(16, tile_bytes // (packed.cols * dtype.itemsize) // 16 * 16)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _unpacked(
    packed: Packed, start: int, stop: int, rounded: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """Rows of the matrix, rounded to one dtype and held in another.

    Shapes: → [stop − start, cols]
    """
    cols = packed.cols
    if rounded == torch.bfloat16 and native_reads(packed):
        n_threads = 1 + (stop - start) * cols // _WORTH_A_THREAD
        return unpack_native(packed, start, stop, n_threads).to(dtype)
    if not methods() or rounded not in _ROUNDING or not _readable(packed):
        return packed.rows(start, stop).dense(rounded).to(dtype)
    tile = packed.codes.new_empty(stop - start, -(-cols // 16) * 16, dtype=dtype)
    rounding = _ROUNDING[rounded]
    job = _job(packed, 0 if _is_sum(packed) else rounding)
    job |= {
        "first_row": start,
        "rows": stop,
        "offset": 0 if packed.offset is None else packed.offset.data_ptr(),
        "out": tile.data_ptr(),
        "out_bytes": tile.stride(0) * tile.element_size(),
        "out_rounding": rounding if _is_sum(packed) else 0,
        "out_kind": _ROUNDING[dtype],
    }
    run_job(find_loop("unpack"), make_job(job), 1 + tile.numel() // _WORTH_A_THREAD)
    return tile[:, :cols]


def _is_sum(packed: Packed) -> bool:
    """Whether weights are sums, which are rounded as such, and not their terms."""
    return packed.offset is not None or packed.second_codes is not None


def _job(packed: Packed, rounding: int) -> dict[str, Any]:
    """What the loops need to know of a matrix."""
    rows, cols = len(packed.codes), packed.cols
    groups = packed.scale.shape[1]
    second, second_scale = packed.second_codes, packed.second_scale
    return {
        "rows": rows,
        "row_bytes": packed.codes.shape[1],
        "words": -(-cols // 16),
        "group_words": (packed.group_size or cols) // 16 if groups > 1 else cols + 1,
        "groups": groups,
        "scale_step": 0 if packed.scale.shape[0] == 1 else groups,
        "rounding": rounding,
        "codes": packed.codes.data_ptr(),
        "scale": packed.scale.data_ptr(),
        "second_codes": 0 if second is None else second.data_ptr(),
        "second_scale": 0 if second_scale is None else second_scale.data_ptr(),
    }
