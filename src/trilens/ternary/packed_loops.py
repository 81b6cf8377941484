"""The compiled loops over packed codes. Needs numba; `packed_team` imports it where it is there.

A loop is called with the address of a job: 64-bit numbers in the order of `JOB`, some of them
addresses of memory that the caller holds. Several threads may run the same job at once: each takes
the next stripe of rows until none is left. The loops never call Python and hold no lock.

How a stripe of 64 rows is multiplied: 64 bytes of each row are turned, so that one vector holds the
same 16 columns of 16 rows. Four bits of it are two trits, and pick the sum ±x₀ ± x₁ that they stand
for out of 16 prepared ones: one permutation and one addition for 32 weights. Processors without
AVX-512 pick ±x of one column (AVX), or convert the trits to numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding
from numba import cfunc, njit
from numba.core import config

from trilens.ternary import vectors as v

__all__ = ["JOB", "LOOPS", "STRIPE", "compile_loop", "methods_here"]

JOB = (
    "next",  # the stripe that the next thread takes; starts at 0
    "rows",  # of the matrix; `unpack`: one past the last row to unpack
    "first_row",  # `unpack`: the first row to unpack
    "row_bytes",  # of the codes
    "words",  # 16 columns each, in a row
    "group_words",  # in a group; more than `words` where a row has one scale
    "groups",  # of a row
    "scale_step",  # numbers from row to row of the scales; 0 for one scale for all
    "rounding",  # of the scales: 0 none, 1 bfloat16, 2 float16
    "codes",  # address
    "scale",  # address of float32
    "second_codes",  # address or 0
    "second_scale",  # address or 0
    "offset",  # `unpack`: address of float32, or 0
    "batch",  # inputs
    "inputs",  # address of what `prepare` made
    "input_bytes",  # of one input there
    "x",  # `prepare`: address of float32 [batch, cols]
    "cols",  # `prepare`: in a row of x
    "out",  # address: float32 [batch, rows]; `unpack`: [rows, out_bytes]
    "out_bytes",  # `unpack`: from row to row
    "out_rounding",  # `unpack`: of the sums, as `rounding`
    "out_kind",  # `unpack`: what is stored: 0 float32, 1 bfloat16, 2 float16
)
(
    _NEXT,
    _ROWS,
    _FIRST_ROW,
    _ROW_BYTES,
    _WORDS,
    _GROUP_WORDS,
    _GROUPS,
    _SCALE_STEP,
    _ROUNDING,
    _CODES,
    _SCALE,
    _SECOND_CODES,
    _SECOND_SCALE,
    _OFFSET,
    _BATCH,
    _INPUTS,
    _INPUT_BYTES,
    _X,
    _COLS,
    _OUT,
    _OUT_BYTES,
    _OUT_ROUNDING,
    _OUT_KIND,
) = range(len(JOB))

STRIPE = 64
_UNPACKED = 16  # rows that a thread unpacks before it asks for more

# The codes of −1, 0, 1 (and 3, which no matrix holds) over and over: the first of two trits, or a
# single one, by the number that names it; and each four times: the second of two.
_QUICK, _SLOW = 0xE4E4E4E4, 0xFFAA5500


@njit(inline="always")
def _aligned(buffer: Any) -> Any:
    return (buffer.ctypes.data + 63) & ~63


@njit(inline="always")
def _rounded(values: Any, rounding: Any) -> Any:
    if rounding == 1:
        values = v.rounded_bfloat16(values)
    elif rounding == 2:
        values = v.rounded_float16(values)
    return values


@njit(inline="always")
def _last_word(address: Any, n_bytes: Any) -> Any:
    """A word of which only the first bytes may be read."""
    word = np.int64(0)
    for i in range(n_bytes):
        word |= v.read_byte(address + i) << (8 * i)
    return word


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
                    value = _last_word(address + 4 * word, n_bytes - 4 * whole)
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
    step, groups, rounding = v.read(job, _SCALE_STEP), v.read(job, _GROUPS), v.read(job, _ROUNDING)
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
            v.store_floats(out + 64 * part, _rounded(values, rounding))


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
def _add_chunk(  # noqa: PLR0917 - compiled: neither names nor objects
    pairs: Any, singles: Any, column_bytes: Any, x: Any, turned: Any, word: Any, stop: Any,
    group_words: Any, scales: Any, total: Any,
) -> None:
    """Adds what the words `word` … `stop` − 1 of a stripe give for one input."""
    group = word // group_words
    left = group_words - word % group_words
    x += word * column_bytes
    while word < stop:
        a0, a1, a2, a3 = v.zeros(), v.zeros(), v.zeros(), v.zeros()
        last = min(stop, word + left)
        for _ in range(word, last):
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
    rows, row_bytes, words = v.read(job, _ROWS), v.read(job, _ROW_BYTES), v.read(job, _WORDS)
    group_words, groups = v.read(job, _GROUP_WORDS), v.read(job, _GROUPS)
    batch, inputs, input_bytes = v.read(job, _BATCH), v.read(job, _INPUTS), v.read(job, _INPUT_BYTES)
    out = v.read(job, _OUT)
    turned_buffer, tail_buffer = np.empty(1040, np.float32), np.empty(272, np.float32)
    scale_buffer = np.empty(64 * ((groups + 15) // 16 * 16) + 16, np.float32)
    total_buffer = np.empty(64 * batch + 16, np.float32)
    turned, tail = _aligned(turned_buffer), _aligned(tail_buffer)
    scales, totals = _aligned(scale_buffer), _aligned(total_buffer)
    while True:
        first = STRIPE * v.next_number(job)
        if first >= rows:
            break
        first = min(first, rows - STRIPE)  # the last one overlaps: the same values once more
        for i in range(4 * batch):
            v.store_floats(totals + 64 * i, v.zeros())
        for plane in range(2):
            codes = v.read(job, _SECOND_CODES if plane else _CODES)
            if codes == 0:
                break
            scale = v.read(job, _SECOND_SCALE if plane else _SCALE)
            _stripe_scales(job, scale, first, scales, tail)
            source = codes + first * row_bytes
            for word in range(0, words, 16):
                _turn(source + 4 * word, row_bytes, row_bytes - 4 * word, turned, tail)
                for i in range(batch):
                    _add_chunk(
                        pairs, singles, column_bytes, inputs + i * input_bytes, turned, word,
                        min(word + 16, words), group_words, scales, totals + 256 * i,
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


@njit(inline="always")
def _value(values: Any, group: Any) -> Any:
    return v.splat(v.read_float(values + 4 * group))


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
    x, cols, words = v.read(job, _X), v.read(job, _COLS), v.read(job, _WORDS)
    first, second = v.spread_trits(_QUICK), v.spread_trits(_SLOW)
    for i in range(v.read(job, _BATCH)):
        out = v.read(job, _INPUTS) + i * v.read(job, _INPUT_BYTES)
        for pair in range(8 * words):
            a = v.times(first, v.splat(_column(x, 2 * pair, cols)))
            b = v.times(second, v.splat(_column(x, 2 * pair + 1, cols)))
            v.store_floats(out + 64 * pair, v.add(a, b))
        x += 4 * cols


def unpack(job: Any) -> None:
    """Rows of the matrix: numbers of a dtype, rounded once."""
    stop, start = v.read(job, _ROWS), v.read(job, _FIRST_ROW)
    sums = v.read(job, _SECOND_CODES) != 0 or v.read(job, _OFFSET) != 0
    while True:
        first = start + _UNPACKED * v.next_number(job)
        if first >= stop:
            break
        for row in range(first, min(first + _UNPACKED, stop)):
            out = v.read(job, _OUT) + (row - start) * v.read(job, _OUT_BYTES)
            if sums:
                _unpack_sums(job, row, out)
            else:
                _unpack_row(job, row, out)


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
    code = np.int64(0)
    if n_bytes >= 4:
        code = v.read_word(codes + 4 * word)
    else:
        code = _last_word(codes + 4 * word, n_bytes)
    return code


@njit
def _unpack_row(job: Any, row: Any, out: Any) -> None:
    words, row_bytes = v.read(job, _WORDS), v.read(job, _ROW_BYTES)
    group_words, kind = v.read(job, _GROUP_WORDS), v.read(job, _OUT_KIND)
    codes = v.read(job, _CODES) + row * row_bytes
    scale = v.read(job, _SCALE) + 4 * row * v.read(job, _SCALE_STEP)
    group = np.int64(0)
    for start in range(0, words, group_words):
        factor = _rounded(_value(scale, group), v.read(job, _ROUNDING))
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
    words, row_bytes = v.read(job, _WORDS), v.read(job, _ROW_BYTES)
    group_words, rounding = v.read(job, _GROUP_WORDS), v.read(job, _OUT_ROUNDING)
    second, offset, kind = v.read(job, _SECOND_CODES), v.read(job, _OFFSET), v.read(job, _OUT_KIND)
    at, shift = row * row_bytes, 4 * row * v.read(job, _SCALE_STEP)
    codes, scale = v.read(job, _CODES) + at, v.read(job, _SCALE) + shift
    group = np.int64(0)
    for start in range(0, words, group_words):
        first, other, added = _value(scale, group), v.zeros(), v.zeros()
        if second:
            other = _value(v.read(job, _SECOND_SCALE) + shift, group)
        if offset:
            added = _value(offset + shift, group)
        for word in range(start, min(start + group_words, words)):
            values = v.times(v.spread_trits(_word(codes, word, row_bytes)), first)
            if second:
                trits = v.spread_trits(_word(second + at, word, row_bytes))
                values = v.add(values, v.times(trits, other))
            if offset:
                values = v.add(values, added)
            _store(out, word, _rounded(values, rounding), kind)
        group += 1


LOOPS = {
    "multiply_pairs": multiply_pairs,
    "multiply_singles": multiply_singles,
    "multiply_any": multiply_any,
    "prepare_pairs": prepare_pairs,
    "unpack": unpack,
}


def methods_here() -> tuple[str, ...]:
    """The ways to multiply that this processor has, the fastest first."""
    if config.CPU_FEATURES is not None:  # set by the user, for numba
        features = set(config.CPU_FEATURES.split(","))
    elif config.CPU_NAME == "generic":
        features = set()
    else:
        features = {f"+{name}" for name, on in binding.get_host_cpu_features().items() if on}
    found = []
    if "+avx512f" in features:
        found.append("pairs")
    if "+avx" in features:
        found.append("singles")
    return (*found, "any")


def compile_loop(name: str) -> Any:
    """A loop as a compiled function for C, to be called with the address of a job.

    Compiling takes seconds, once: the result is kept where numba keeps such things.
    """
    try:
        return cfunc("void(int64)", cache=True)(LOOPS[name])
    except RuntimeError:  # numba finds no directory that it may write to
        return cfunc("void(int64)")(LOOPS[name])
