"""The compiled multiplication of a few inputs with packed codes. Needs numba.

How a stripe of 64 rows is multiplied: 64 bytes of each row are turned, so that one vector holds the
same 16 columns of 16 rows. Four bits of it are two trits, and pick the sum ±x₀ ± x₁ that they stand
for out of 16 prepared ones: one permutation and one addition for 32 weights. Processors without
AVX-512 pick ±x of one column (AVX), or convert the trits to numbers.

Helpers are either inlined by numba or compiled once each: inlined by LLVM, compiling took seven
times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from trilens.ternary.packed.cpu import jobs as j
from trilens.ternary.packed.cpu import vectors as v
from trilens.ternary.packed.cpu.jobs import last_word, rounded

__all__ = ["STRIPE", "multiply_any", "multiply_pairs", "multiply_singles", "prepare_pairs"]

STRIPE = 64

# The codes of −1, 0, 1 (and 3, which no matrix holds) over and over: the first of two trits, or a
# single one, by the number that names it; and each four times: the second of two.
_QUICK, _SLOW = 0xE4E4E4E4, 0xFFAA5500


@njit(inline="always")
def _aligned(buffer: Any) -> Any:
    return (buffer.ctypes.data + 63) & ~63


@njit
def _turn_part(source: Any, stride: Any, n_bytes: Any, out: Any, tail: Any) -> None:
    """`vectors.transpose`, also for rows of which less than 64 bytes are left."""
    if n_bytes < 64:
        whole = n_bytes // 4
        for row in range(16):
            address, target = source + row * stride, tail + 64 * row
            for word in range(16):
                value = np.int64(0)
                if word < whole:
                    value = v.read_word(address + 4 * word)
                elif word == whole:
                    value = last_word(address + 4 * word, n_bytes - 4 * whole)
                v.write_word(target + 4 * word, value)
        source, stride = tail, 64
    v.transpose(source, stride, out)


@njit(inline="always")
def _turn(source: Any, stride: Any, n_bytes: Any, out: Any, tail: Any) -> None:
    """64 bytes of 64 rows: vectors [16 words, 4 × 16 rows]."""
    for part in range(4):
        _turn_part(source + 16 * part * stride, stride, n_bytes, out + 64 * part, tail)


@njit
def _stripe_scales(job: Any, scale: Any, first: Any, out: Any, tail: Any) -> None:
    """The scales of a stripe: float32 [groups, 64 rows], rounded."""
    step, groups, rounding = (
        v.read(job, j.SCALE_STEP),
        v.read(job, j.GROUPS),
        v.read(job, j.ROUNDING),
    )
    address = scale + 4 * step * first
    if step == 0:
        for part in range(4):
            v.store_floats(out + 64 * part, v.splat(v.read_float(scale)))
    elif groups == 1:
        for part in range(4):
            v.store_floats(out + 64 * part, v.load_floats(address + 64 * part))
    else:
        for group in range(0, groups, 16):
            _turn(address + 4 * group, 4 * step, 4 * (groups - group), out + 256 * group, tail)
    if rounding:
        for part in range(4 * groups):
            values = v.load_floats(out + 64 * part)
            v.store_floats(out + 64 * part, rounded(values, rounding))


@njit(inline="always")
def _pairs(x: Any, w0: Any, w1: Any, w2: Any, w3: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    for pair in range(8):
        sums = v.load_floats(x + 64 * pair)
        a0 = v.add(a0, v.permute_avx512(sums, v.shift(w0, 4 * pair)))
        a1 = v.add(a1, v.permute_avx512(sums, v.shift(w1, 4 * pair)))
        a2 = v.add(a2, v.permute_avx512(sums, v.shift(w2, 4 * pair)))
        a3 = v.add(a3, v.permute_avx512(sums, v.shift(w3, 4 * pair)))
    return a0, a1, a2, a3


@njit(inline="always")
def _singles(x: Any, w0: Any, w1: Any, w2: Any, w3: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    trits = v.spread_trits(_QUICK)
    for column in range(16):
        values = v.times(trits, v.splat(v.read_float(x + 4 * column)))
        a0 = v.add(a0, v.permute_avx(values, v.shift(w0, 2 * column)))
        a1 = v.add(a1, v.permute_avx(values, v.shift(w1, 2 * column)))
        a2 = v.add(a2, v.permute_avx(values, v.shift(w2, 2 * column)))
        a3 = v.add(a3, v.permute_avx(values, v.shift(w3, 2 * column)))
    return a0, a1, a2, a3


@njit(inline="always")
def _any(x: Any, w0: Any, w1: Any, w2: Any, w3: Any, a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    for column in range(16):
        value = v.splat(v.read_float(x + 4 * column))
        a0 = v.fused(v.trits_at(v.shift(w0, 2 * column)), value, a0)
        a1 = v.fused(v.trits_at(v.shift(w1, 2 * column)), value, a1)
        a2 = v.fused(v.trits_at(v.shift(w2, 2 * column)), value, a2)
        a3 = v.fused(v.trits_at(v.shift(w3, 2 * column)), value, a3)
    return a0, a1, a2, a3


@njit(inline="always")
def _add_scaled(total: Any, scale: Any, sums: Any) -> None:
    v.store_floats(total, v.fused(sums, v.load_floats(scale), v.load_floats(total)))


@njit
def _add_chunk(
    pairs: Any,
    singles: Any,
    column_bytes: Any,
    x: Any,
    turned: Any,
    word: Any,
    stop: Any,
    group_words: Any,
    scales: Any,
    total: Any,
    ahead: Any,
) -> None:
    """Adds what the words `word` … `stop` − 1 of a stripe give for one input.

    64 rows in turn are too many streams for the processor to foresee, so `ahead`, 256 bytes for
    each word, is asked for: in the end the whole of the next stripe.
    """
    group = word // group_words
    left = group_words - word % group_words
    x += word * column_bytes
    while word < stop:
        a0, a1, a2, a3 = v.zeros(), v.zeros(), v.zeros(), v.zeros()
        last = min(stop, word + left)
        for _ in range(word, last):
            for line in range(4):
                v.prefetch(ahead + 64 * line)
            ahead += 256
            w0, w1 = v.load_words(turned), v.load_words(turned + 64)
            w2, w3 = v.load_words(turned + 128), v.load_words(turned + 192)
            # numba leaves out the branches that the types decide
            if pairs is not None:
                a0, a1, a2, a3 = _pairs(x, w0, w1, w2, w3, a0, a1, a2, a3)
            elif singles is not None:
                a0, a1, a2, a3 = _singles(x, w0, w1, w2, w3, a0, a1, a2, a3)
            else:
                a0, a1, a2, a3 = _any(x, w0, w1, w2, w3, a0, a1, a2, a3)
            turned += 256
            x += column_bytes
        scale = scales + 256 * group
        _add_scaled(total, scale, a0)
        _add_scaled(total + 64, scale + 64, a1)
        _add_scaled(total + 128, scale + 128, a2)
        _add_scaled(total + 192, scale + 192, a3)
        word = last
        left = group_words
        group += 1


@njit
def _multiply(job: Any, pairs: Any, singles: Any, column_bytes: Any) -> None:
    rows, row_bytes, words = v.read(job, j.ROWS), v.read(job, j.ROW_BYTES), v.read(job, j.WORDS)
    group_words, groups = v.read(job, j.GROUP_WORDS), v.read(job, j.GROUPS)
    batch, inputs, input_bytes = (
        v.read(job, j.BATCH),
        v.read(job, j.INPUTS),
        v.read(job, j.INPUT_BYTES),
    )
    out = v.read(job, j.OUT)
    turned_buffer, tail_buffer = np.empty(1040, np.float32), np.empty(272, np.float32)
    scale_buffer = np.empty(64 * ((groups + 15) // 16 * 16) + 16, np.float32)
    total_buffer = np.empty(64 * batch + 16, np.float32)
    turned, tail = _aligned(turned_buffer), _aligned(tail_buffer)
    scales, totals = _aligned(scale_buffer), _aligned(total_buffer)
    following = STRIPE * v.next_number(job)
    while following < rows:
        first = min(following, rows - STRIPE)  # the last one overlaps: the same values once more
        following = STRIPE * v.next_number(job)
        for i in range(4 * batch):
            v.store_floats(totals + 64 * i, v.zeros())
        for plane in range(2):
            codes = v.read(job, j.SECOND_CODES if plane else j.CODES)
            if codes == 0:
                break
            scale = v.read(job, j.SECOND_SCALE if plane else j.SCALE)
            _stripe_scales(job, scale, first, scales, tail)
            source = codes + first * row_bytes
            for word in range(0, words, 16):
                _turn(source + 4 * word, row_bytes, row_bytes - 4 * word, turned, tail)
                ahead = codes + following * row_bytes + STRIPE * 4 * word
                for i in range(batch):
                    _add_chunk(
                        pairs,
                        singles,
                        column_bytes,
                        inputs + i * input_bytes,
                        turned,
                        word,
                        min(word + 16, words),
                        group_words,
                        scales,
                        totals + 256 * i,
                        ahead,
                    )
        for i in range(batch):
            for part in range(4):
                values = v.load_floats(totals + 256 * i + 64 * part)
                v.store_floats(out + 4 * (i * rows + first) + 64 * part, values)
    # numba frees an array after its last mention, and does not see that its address is in use
    turned_buffer[0] = tail_buffer[0] = scale_buffer[0] = total_buffer[0] = 0.0


@njit(inline="always")
def _column(x: Any, column: Any, cols: Any) -> Any:
    return v.read_float(x + 4 * column) if column < cols else np.float32(0.0)


def multiply_pairs(job: Any) -> None:
    """Multiplies by sums of two prepared by `prepare_pairs`. AVX-512."""
    _multiply(job, True, None, 512)


def multiply_singles(job: Any) -> None:
    """Multiplies by columns, sign by permutation. AVX."""
    _multiply(job, None, True, 64)


def multiply_any(job: Any) -> None:
    """Multiplies by columns, on any processor."""
    _multiply(job, None, None, 64)


def prepare_pairs(job: Any) -> None:
    """All sums ±x₀ ± x₁ of two neighbouring columns: float32 [batch, words · 8, 16]."""
    x, cols, words = v.read(job, j.X), v.read(job, j.COLS), v.read(job, j.WORDS)
    first, second = v.spread_trits(_QUICK), v.spread_trits(_SLOW)
    for i in range(v.read(job, j.BATCH)):
        out = v.read(job, j.INPUTS) + i * v.read(job, j.INPUT_BYTES)
        for pair in range(8 * words):
            a = v.times(first, v.splat(_column(x, 2 * pair, cols)))
            b = v.times(second, v.splat(_column(x, 2 * pair + 1, cols)))
            v.store_floats(out + 64 * pair, v.add(a, b))
        x += 4 * cols
