"""Products with packed codes by `native.c`, a library that is built with the package.

It is absent where there was no compiler, and computes nothing on processors that do not multiply
bfloat16: `native_computes` says so, and numba's loops do the work.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from contextlib import suppress
from functools import cache, lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.ternary.packed.cpu.limbs import TILE_INPUTS, WIDE, find_limbs
from trilens.ternary.packed.cpu.native_sources import hash_of_sources
from trilens.ternary.packed.cpu.thread_pool import Job, Loop, run_job
from trilens.ternary.packed.matrix import Packed

__all__ = [
    "JOB",
    "multiply_int8_native",
    "multiply_native",
    "native_computes",
    "native_multiplies_int8",
    "native_reads",
    "unpack_native",
]

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
    "second_codes",  # address or 0
    "second_scale",  # address or 0
    "offset",  # address or 0
    "batch",  # inputs
    "chunk",  # blocks of inputs that are multiplied before the next ones are looked at
    "limbs",  # bytes of an input
    "parts",  # limbs: groups that 256 columns belong to, at most
    "span_steps",  # limbs: steps of 256 columns whose sums are scaled at once
    "source",  # `prepare`: address of bfloat16 (or int8) [batch, cols]
    "x",  # address of what `prepare` makes: as many steps of 32 or 256 columns for each input
    "bias",  # address of float32 [rows], or 0
    "sums",  # int8: address of int32 [batch, steps, 16]; one, limbs: see `limbs`
    "places",  # address of 128 bytes for each step of 256 columns; limbs: for each span
    "factors",  # int8, one, limbs: address of float32 [batch]
    "out",  # address of bfloat16 (int8: float32) [batch, rows]; `unpack`: [rows, out_bytes]
    "out_bytes",  # from input to input; `unpack`: from row to row
    "large",  # whether inputs are too large (limbs: too different in size) for `prepare`'s way
)

_FUNCTIONS = (
    *("level", "unpack", "prepare", "multiply", "prepare_few", "multiply_few"),
    *("prepare_int8", "multiply_int8", "prepare_one", "multiply_one"),
    *("prepare_limbs", "multiply_limbs", "prepare_tiles", "multiply_tiles"),
)
_ONE, _SEVERAL = ("prepare_one", "multiply_one"), ("prepare_limbs", "multiply_limbs")
_AT = {name: place for place, name in enumerate(JOB)}
_ROWS, _LARGE = _AT["rows"], _AT["large"]
_STEP, _EDGE = 32, 16  # columns at a time; that share a scale
_MOST_GROUPS = 1024  # their values lie on a thread's stack
_CHUNK_BYTES = 1 << 20  # inputs that stay in a core's cache
_MOST_BLOCKS = 64  # of a chunk: their sums may lie on a thread's stack
_INPUTS_AT_ONCE = 6
_FEW = 4
_INT8_AT_ONCE = 2
_FOUR_STEPS = 128  # columns whose codes are read at once
_MOST_COLS = 1 << 22  # whose codes times bytes an int32 can sum up
_WORTH_A_THREAD = 1 << 19  # numbers to copy
_KEPT = 1 << 12  # jobs that are kept for the next call, of some 600 bytes each, key and all
_SCRATCH = 1 << 18  # bytes that a product keeps for the next one
_MOST_INPUTS = 192  # beyond, torch multiplies unpacked tiles faster on one thread

_scratch: list[tuple[Tensor, int]] = []  # taken and given back whole: threads may share the list


def native_reads(packed: Packed) -> bool:
    """Whether the library is here and unpacks such a matrix: groups of whole steps."""
    return _reads(packed, _STEP)


def native_computes(x: Tensor, packed: Packed) -> bool:
    """Whether `multiply_native` can, and is the fastest way.

    Shapes: x [..., cols]
    """
    return (
        x.dtype == torch.bfloat16
        and x.numel() > 0
        and native_reads(packed)
        and x.numel() <= packed.cols * _most_inputs()
    )


def _most_inputs() -> float:
    # Several threads would meet after every tile, and wait for the one that another process delays.
    return _MOST_INPUTS if torch.get_num_threads() < 2 and not _has_matrix_units() else math.inf


def native_multiplies_int8(packed: Packed) -> bool:
    """Whether `multiply_int8_native` reads such a matrix."""
    return _reads(packed, _EDGE)


def _reads(packed: Packed, step: int) -> bool:
    size = packed.group_size
    if not (
        (size is None or size % step == 0 or size >= packed.cols)
        and 0 < packed.scale.shape[1] <= _MOST_GROUPS
        and packed.codes.is_contiguous()
        and (packed.second_codes is None or packed.second_codes.is_contiguous())
        and _level() > 0
    ):
        return False
    for part in (packed.scale, packed.second_scale, packed.offset):
        if part is not None and not (part.dtype == torch.float32 and part.is_contiguous()):
            return False
    return True


def multiply_native(x: Tensor, packed: Packed, bias: Tensor | None, n_threads: int = 1) -> Tensor:
    """x · Ŵᵀ + b, summed in float32 and rounded once.

    Shapes: x bfloat16 [..., cols] → bfloat16 [..., rows]

    Args:
        x: the inputs.
        packed: what `native_reads`.
        bias: added before the sums are rounded.
        n_threads: threads that are worth it.
    """
    n_inputs, rows = x.numel() // packed.cols, packed.codes.shape[0]
    out = x.new_empty((*x.shape[:-1], rows))
    added = None if bias is None else bias.detach().float().contiguous().resolve_neg()
    x = x.contiguous().resolve_neg()
    job = _job(packed)
    job[_AT["batch"]], job[_AT["source"]] = n_inputs, x.data_ptr()
    job[_AT["out"]], job[_AT["out_bytes"]] = out.data_ptr(), 2 * rows
    if added is not None:
        _set(job, bias=added.data_ptr())
    if n_inputs == 1 or _has_matrix_units():
        for limbs in (2, 3):
            if _multiply_limbs(job, packed, n_inputs, limbs, n_threads):
                return out
    if _has_matrix_units():
        _multiply_tiles(job, packed, n_inputs, n_threads)
        return out
    if _are_few(n_inputs, packed) and _multiply_few(job, packed, n_inputs, n_threads):
        return out
    input_bytes = 2 * -(-packed.cols // _STEP) * _STEP
    prepared = x
    if n_inputs > 1 or packed.cols % _STEP:
        prepared = x.new_empty(n_inputs, input_bytes // 2)
        _set(job, x=prepared.data_ptr())
        run_job(_function("prepare"), job, 1 + prepared.numel() // _WORTH_A_THREAD)
    _set(job, x=prepared.data_ptr(), chunk=_blocks(n_inputs, _INPUTS_AT_ONCE, input_bytes))
    run_job(_function("multiply"), job, n_threads)
    return out


def multiply_int8_native(
    rounded: Tensor, factors: Tensor, packed: Packed, n_threads: int = 1
) -> Tensor:
    """factors · (x · Ŵᵀ), in whole numbers but for the scales.

    Shapes: rounded int8 [inputs, cols]; factors float32 [inputs] → float32 [inputs, rows]
    """
    n_inputs, steps = rounded.shape[0], -(-packed.cols // WIDE)
    out = factors.new_empty(n_inputs, packed.codes.shape[0])
    x = rounded.new_empty(n_inputs, steps * WIDE)
    sums = rounded.new_empty(n_inputs, steps * 16, dtype=torch.int32)
    places = packed.codes.new_empty(steps, 128)
    job = _job(packed)
    _set(
        job,
        batch=n_inputs,
        chunk=_blocks(n_inputs, _INT8_AT_ONCE, steps * (WIDE + 64)),
        source=rounded.data_ptr(),
        x=x.data_ptr(),
        sums=sums.data_ptr(),
        places=places.data_ptr(),
        factors=factors.data_ptr(),
        out=out.data_ptr(),
        out_bytes=4 * out.shape[1],
    )
    run_job(_function("prepare_int8"), job)
    run_job(_function("multiply_int8"), job, n_threads)
    return out


def unpack_native(packed: Packed, start: int, stop: int, n_threads: int = 1) -> Tensor:
    """Rows of the matrix, as a dense layer of bfloat16 holds them.

    Shapes: → bfloat16 [stop − start, cols]
    """
    cols = -(-packed.cols // _STEP) * _STEP
    tile = packed.codes.new_empty(stop - start, cols, dtype=torch.bfloat16)
    job = _job(packed)
    _set(job, first_row=start, rows=stop, out=tile.data_ptr(), out_bytes=2 * tile.shape[1])
    run_job(_function("unpack"), job, n_threads)
    return tile[:, : packed.cols]


def _are_few(n_inputs: int, packed: Packed) -> bool:
    """Whether codes are read as numbers, and scaled as sums of columns."""
    return n_inputs <= _FEW and packed.levels == 3 and packed.offset is None


def _multiply_few(job: Job, packed: Packed, n_inputs: int, n_threads: int) -> bool:
    """Whether it was done: the largest inputs would overflow before they are scaled."""
    steps = -(-packed.cols // WIDE)
    # one piece of memory: what `prepare` makes of the inputs, and where scales stand
    made = packed.codes.new_empty(2 * steps * (n_inputs * WIDE + 64))
    places = made.data_ptr() + 2 * steps * n_inputs * WIDE
    _set(job, x=made.data_ptr(), places=places)
    run_job(_function("prepare_few"), job)
    if job[_LARGE]:
        return False
    run_job(_function("multiply_few"), job, n_threads)
    return True


def _multiply_limbs(job: Job, packed: Packed, n_inputs: int, limbs: int, n_threads: int) -> bool:
    """Whether it was done: for a few inputs, whose numbers are whole ones of so many bytes."""
    if packed.offset is not None or packed.cols > _MOST_COLS:
        return False
    one_group = packed.scale.shape[1] == 1
    kept = find_limbs(n_inputs, packed.cols, packed.group_size, one_group, limbs)
    if kept is None:
        return False
    made, x = _take_scratch(kept.size)
    job[_AT["limbs"]], job[_AT["parts"]] = limbs, kept.parts
    job[_AT["span_steps"]], job[_AT["x"]] = kept.span_steps, x
    job[_AT["places"]], job[_AT["sums"]] = x + kept.places, x + kept.sums
    job[_AT["factors"]] = x + kept.factors
    prepare, multiply = _ONE if n_inputs == 1 else _SEVERAL
    run_job(_function(prepare), job)
    done = not job[_LARGE]
    if done:
        run_job(_function(multiply), job, n_threads)
    _give_back(made, x)
    return done


def _take_scratch(size: int) -> tuple[Tensor, int]:
    """Memory for one product, and its address."""
    if size <= _SCRATCH:
        with suppress(IndexError):  # another thread may take the last one
            return _scratch.pop()
    made = torch.empty(max(size, _SCRATCH), dtype=torch.uint8, device="cpu")
    return made, made.data_ptr()


def _give_back(made: Tensor, address: int) -> None:
    if made.shape[0] == _SCRATCH:
        _scratch.append((made, address))


def _multiply_tiles(job: Job, packed: Packed, n_inputs: int, n_threads: int) -> None:
    cols = -(-packed.cols // _FOUR_STEPS) * _FOUR_STEPS
    side = min(n_inputs, TILE_INPUTS)
    n_made = -(-n_inputs // side) * side
    made = packed.codes.new_empty(n_made, cols, dtype=torch.bfloat16)
    _set(job, x=made.data_ptr(), chunk=_blocks(n_inputs, TILE_INPUTS, 2 * cols))
    run_job(_function("prepare_tiles"), job, 1 + made.numel() // _WORTH_A_THREAD)
    run_job(_function("multiply_tiles"), job, n_threads)


def _blocks(n_inputs: int, at_once: int, input_bytes: int) -> int:
    """Blocks of a chunk, so that chunks are of nearly equal size."""
    blocks = -(-n_inputs // at_once)
    most = min(max(1, _CHUNK_BYTES // (at_once * input_bytes)), _MOST_BLOCKS)
    return -(-blocks // -(-blocks // most))


def _job(packed: Packed) -> Job:
    """A job that knows the matrix."""
    codes, scale, offset = packed.codes, packed.scale, packed.offset
    second, second_scale = packed.second_codes, packed.second_scale
    rows, row_bytes = codes.shape
    units, groups = scale.shape
    return _kept_job(
        rows,
        row_bytes,
        packed.cols,
        packed.group_size or packed.cols,
        groups,
        0 if units == 1 else groups,
        codes.data_ptr(),
        scale.data_ptr(),
        0 if second is None else second.data_ptr(),
        0 if second_scale is None else second_scale.data_ptr(),
        0 if offset is None else offset.data_ptr(),
    )[:]


@lru_cache(_KEPT)
def _kept_job(*matrix: int) -> Job:
    """The fields of `JOB` from "rows" to "offset". To be copied: a call fills in the others."""
    job = array("q", [0]) * len(JOB)
    job[_ROWS : _ROWS + len(matrix)] = array("q", matrix)
    return job


def _set(job: Job, **fields: int) -> None:
    """Fill in fields; where a microsecond counts, they are written one by one."""
    for name, value in fields.items():
        job[_AT[name]] = value


@cache
def _library() -> Any:
    """The built library, or None where none was built, or one of other sources than are here."""
    here = hash_of_sources(Path(__file__).parent)
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
                tell, built_of = library.trilens_native_job, library.trilens_native_sources
            except (OSError, AttributeError):  # built for another machine, or long ago
                continue
            tell.restype = built_of.restype = ctypes.c_char_p
            whole = all(hasattr(library, f"trilens_native_{name}") for name in _FUNCTIONS)
            same = here in ("", built_of().decode())
            if whole and same and tuple(tell().decode().split(", ")) == JOB:
                return library
    return None


@cache
def _level() -> int:
    library = _library()
    return 0 if library is None else int(library.trilens_native_level())


def _has_matrix_units() -> bool:
    return _level() > 1


@cache
def _function(name: str) -> Loop:
    library = _library()
    found = getattr(library, f"trilens_native_{name}")
    address = ctypes.cast(found, ctypes.c_void_p).value or 0
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    return Loop(call, address, library)
