"""The compiled unpacking of rows of a packed matrix. Needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from trilens.ternary.packed.cpu import jobs as j
from trilens.ternary.packed.cpu import vectors as v
from trilens.ternary.packed.cpu.jobs import last_word, rounded, value_at

__all__ = ["unpack"]

_ROWS_AT_ONCE = 16  # a thread unpacks these before it asks for more


@njit(inline="always")
def _store(out: Any, word: Any, values: Any, kind: Any) -> None:
    if kind == 1:
        v.store_bfloat16(out + 32 * word, values)
    elif kind == 2:
        v.store_float16(out + 32 * word, values)
    else:
        v.store_floats(out + 64 * word, values)


@njit(inline="always")
def _word(codes: Any, word: Any, row_bytes: Any) -> Any:
    """A word of a row's codes, which may end within it."""
    n_bytes = row_bytes - 4 * word
    address = codes + 4 * word
    return v.read_word(address) if n_bytes >= 4 else last_word(address, n_bytes)


@njit
def _unpack_row(job: Any, row: Any, out: Any) -> None:
    words, row_bytes = v.read(job, j.WORDS), v.read(job, j.ROW_BYTES)
    group_words, kind = v.read(job, j.GROUP_WORDS), v.read(job, j.OUT_KIND)
    codes = v.read(job, j.CODES) + row * row_bytes
    scale = v.read(job, j.SCALE) + 4 * row * v.read(job, j.SCALE_STEP)
    group = np.int64(0)
    for start in range(0, words, group_words):
        factor = rounded(value_at(scale, group), v.read(job, j.ROUNDING))
        stop = min(start + group_words, words)
        whole = min(stop, row_bytes // 4)
        if kind == 1:  # the same loop for each kind: nothing is decided inside
            for word in range(start, whole):
                trits = v.spread_trits(v.read_word(codes + 4 * word))
                v.store_bfloat16(out + 32 * word, v.times(trits, factor))
        elif kind == 2:
            for word in range(start, whole):
                trits = v.spread_trits(v.read_word(codes + 4 * word))
                v.store_float16(out + 32 * word, v.times(trits, factor))
        else:
            for word in range(start, whole):
                trits = v.spread_trits(v.read_word(codes + 4 * word))
                v.store_floats(out + 64 * word, v.times(trits, factor))
        for word in range(whole, stop):
            trits = v.spread_trits(_word(codes, word, row_bytes))
            _store(out, word, v.times(trits, factor), kind)
        group += 1


@njit
def _unpack_sums(job: Any, row: Any, out: Any) -> None:
    """A row of two planes, or one that has offsets."""
    words, row_bytes = v.read(job, j.WORDS), v.read(job, j.ROW_BYTES)
    group_words, rounding = v.read(job, j.GROUP_WORDS), v.read(job, j.OUT_ROUNDING)
    second, offset, kind = (
        v.read(job, j.SECOND_CODES),
        v.read(job, j.OFFSET),
        v.read(job, j.OUT_KIND),
    )
    at, shift = row * row_bytes, 4 * row * v.read(job, j.SCALE_STEP)
    codes, scale = v.read(job, j.CODES) + at, v.read(job, j.SCALE) + shift
    group = np.int64(0)
    for start in range(0, words, group_words):
        first, other, added = value_at(scale, group), v.zeros(), v.zeros()
        if second:
            other = value_at(v.read(job, j.SECOND_SCALE) + shift, group)
        if offset:
            added = value_at(offset + shift, group)
        for word in range(start, min(start + group_words, words)):
            values = v.times(v.spread_trits(_word(codes, word, row_bytes)), first)
            if second:
                trits = v.spread_trits(_word(second + at, word, row_bytes))
                values = v.add(values, v.times(trits, other))
            if offset:
                values = v.add(values, added)
            _store(out, word, rounded(values, rounding), kind)
        group += 1


def unpack(job: Any) -> None:
    """Rows of the matrix: numbers of a dtype, rounded once."""
    stop, start = v.read(job, j.ROWS), v.read(job, j.FIRST_ROW)
    sums = v.read(job, j.SECOND_CODES) != 0 or v.read(job, j.OFFSET) != 0
    while True:
        first = start + _ROWS_AT_ONCE * v.next_number(job)
        if first >= stop:
            break
        for row in range(first, min(first + _ROWS_AT_ONCE, stop)):
            out = v.read(job, j.OUT) + (row - start) * v.read(job, j.OUT_BYTES)
            if sums:
                _unpack_sums(job, row, out)
            else:
                _unpack_row(job, row, out)
