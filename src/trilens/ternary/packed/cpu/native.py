"""Products of bfloat16 inputs by `native.c`, a library that is built with the package.

It is absent where there was no compiler, and computes nothing on processors that do not multiply
bfloat16: `native_computes` says so, and numba's loops do the work.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.ternary.packed.cpu.thread_pool import Loop, run_job
from trilens.ternary.packed.matrix import Packed

__all__ = ["JOB", "multiply_native", "native_computes", "native_reads", "unpack_native"]

JOB = (
    "next",  # the stripe that the next thread takes; starts at 0
    "first_row",  # `unpack`: the first row to unpack
    "rows",  # of the matrix; `unpack`: one past the last row to unpack
    "row_bytes",  # of the codes
    "cols",
    "group_cols",  # columns of a group, where a row has more than one
    "groups",  # of a row
    "scale_step",  # numbers from row to row of the scales; 0 for one scale for all
    "codes",  # address
    "scale",  # address of float32
    "batch",  # inputs
    "chunk",  # blocks of inputs that are multiplied before the next ones are looked at
    "source",  # `prepare`: address of bfloat16 [batch, cols]
    "x",  # address of what `prepare` makes: bfloat16, as many steps of 32 columns for each input
    "bias",  # address of float32 [rows], or 0
    "out",  # address of bfloat16 [batch, rows]; `unpack`: [rows, out_bytes]
    "out_bytes",  # from input to input; `unpack`: from row to row
)

_NOTHING = dict.fromkeys(JOB, 0)
_STEP = 32  # columns at a time
_MOST_GROUPS = 4096  # their values lie on a thread's stack
_CHUNK_BYTES = 1 << 19  # inputs that stay in a core's cache
_INPUTS_AT_ONCE = 6
_WORTH_A_THREAD = 1 << 19  # numbers to copy
_MOST_INPUTS = 192  # beyond, torch multiplies unpacked tiles faster
_MOST_WITH_MATRIX_UNITS = 8  # the same on a processor with AMX


def native_reads(packed: Packed) -> bool:
    """Whether the library is here and unpacks such a matrix: one plane, groups of whole steps."""
    size, cols = packed.group_size, packed.cols
    return (
        packed.offset is None
        and packed.second_codes is None
        and (size is None or size % _STEP == 0 or size >= cols)
        and 0 < packed.scale.shape[1] <= _MOST_GROUPS
        and packed.scale.dtype == torch.float32
        and packed.scale.is_contiguous()
        and packed.codes.is_contiguous()
        and _level() > 0
    )


def native_computes(flat: Tensor, packed: Packed) -> bool:
    """Whether `multiply_native` can, and is the fastest way.

    Shapes: flat [inputs, cols]
    """
    return (
        flat.dtype == torch.bfloat16
        and flat.numel() > 0
        and native_reads(packed)
        and flat.shape[0] <= (_MOST_WITH_MATRIX_UNITS if _has_matrix_units() else _MOST_INPUTS)
    )


def multiply_native(
    flat: Tensor, packed: Packed, bias: Tensor | None, n_threads: int = 1
) -> Tensor:
    """x · Ŵᵀ + b, summed in float32 and rounded once.

    Shapes: flat bfloat16 [inputs, cols] → bfloat16 [inputs, rows]
    """
    n_inputs = flat.shape[0]
    x = flat.contiguous().resolve_neg()
    input_bytes = 2 * -(-packed.cols // _STEP) * _STEP
    if n_inputs > 1 or packed.cols % _STEP:
        source, x = x, torch.empty(n_inputs, input_bytes // 2, dtype=torch.bfloat16)
        prepare = _job(packed, batch=n_inputs, source=source.data_ptr(), x=x.data_ptr())
        run_job(_function("prepare"), prepare, 1 + x.numel() // _WORTH_A_THREAD)
    out = torch.empty(n_inputs, packed.codes.shape[0], dtype=torch.bfloat16)
    added = None if bias is None else bias.detach().float().contiguous().resolve_neg()
    job = _job(
        packed,
        batch=n_inputs,
        chunk=max(1, _CHUNK_BYTES // (_INPUTS_AT_ONCE * input_bytes)),
        x=x.data_ptr(),
        bias=0 if added is None else added.data_ptr(),
        out=out.data_ptr(),
        out_bytes=2 * out.shape[1],
    )
    run_job(_function("multiply"), job, n_threads)
    return out


def unpack_native(packed: Packed, start: int, stop: int, n_threads: int = 1) -> Tensor:
    """Rows of the matrix, as a dense layer of bfloat16 holds them.

    Shapes: → bfloat16 [stop − start, cols]
    """
    tile = torch.empty(stop - start, -(-packed.cols // _STEP) * _STEP, dtype=torch.bfloat16)
    job = _job(packed, first_row=start, rows=stop, out=tile.data_ptr(), out_bytes=2 * tile.shape[1])
    run_job(_function("unpack"), job, n_threads)
    return tile[:, : packed.cols]


def _job(packed: Packed, **fields: int) -> NDArray[np.int64]:
    groups = packed.scale.shape[1]
    known = (
        _NOTHING
        | {
            "rows": packed.codes.shape[0],
            "row_bytes": packed.codes.shape[1],
            "cols": packed.cols,
            "group_cols": packed.group_size or packed.cols,
            "groups": groups,
            "scale_step": 0 if packed.scale.shape[0] == 1 else groups,
            "codes": packed.codes.data_ptr(),
            "scale": packed.scale.data_ptr(),
        }
        | fields
    )
    return np.array([known[name] for name in JOB], dtype=np.int64)


@cache
def _library() -> Any:
    """The built library, or None."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                continue
    return None


@cache
def _level() -> int:
    library = _library()
    return 0 if library is None else int(library.trilens_native_level())


@cache
def _has_matrix_units() -> bool:
    asks = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asks is not None and bool(asks())


@cache
def _function(name: str) -> Loop:
    library = _library()
    found = getattr(library, f"trilens_native_{name}")
    address = ctypes.cast(found, ctypes.c_void_p).value or 0
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    return Loop(call, address, library)
