"""x · Ŵᵀ from packed codes on a GPU, in Triton. Only `gpu` imports this: Triton is not everywhere.

Each program unpacks a tile of the matrix in registers, as `Packed.dense` would, and multiplies it;
sums are float32. No part of the dense matrix reaches memory.
"""

# Triton reads annotations when it compiles: no `from __future__ import annotations` here.

import triton
import triton.language as tl

__all__ = ["multiply_few", "multiply_many"]


@triton.jit
def _trits(codes, at, shift, inside):  # type: ignore[no-untyped-def]
    found = tl.load(codes + at, mask=inside, other=1).to(tl.int32)
    return (((found >> shift) & 3) - 1).to(tl.float32)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    codes,
    scale,
    second_codes,
    second_scale,
    offset,
    row,
    col,
    rows,
    cols,
    row_bytes,
    scale_step,
    group_size,
    HAS_SECOND: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """Weights in float32 [rows of the tile, columns of the tile]; 0 outside of the matrix."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    at = row[:, None] * row_bytes + col[None, :] // 4
    shift = (col % 4 * 2)[None, :]
    unit = row[:, None] * scale_step + (col // group_size)[None, :]
    weights = _trits(codes, at, shift, inside) * tl.load(scale + unit, mask=inside, other=0.0)
    if HAS_SECOND:
        second = tl.load(second_scale + unit, mask=inside, other=0.0)
        weights += _trits(second_codes, at, shift, inside) * second
    if HAS_OFFSET:
        weights += tl.load(offset + unit, mask=inside, other=0.0)
    return weights


@triton.jit
def multiply_few(  # type: ignore[no-untyped-def]
    x,
    out,
    codes,
    scale,
    second_codes,
    second_scale,
    offset,
    bias,
    rows,
    cols,
    row_bytes,
    scale_step,
    group_size,
    HAS_SECOND: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One input with some rows: the bytes of the codes set the pace, not the products."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        part = tl.load(x + which * cols + col, mask=col < cols, other=0.0)
        weights = _tile(
            codes, scale, second_codes, second_scale, offset, row, col, rows, cols,
            row_bytes, scale_step, group_size, HAS_SECOND, HAS_OFFSET,
        )  # fmt: skip
        weights = weights.to(part.dtype).to(tl.float32)
        total += tl.sum(weights * part.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + which * rows + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def multiply_many(  # type: ignore[no-untyped-def]
    x,
    out,
    codes,
    scale,
    second_codes,
    second_scale,
    offset,
    bias,
    inputs,
    rows,
    cols,
    row_bytes,
    scale_step,
    group_size,
    HAS_SECOND: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Some inputs with some rows, on the matrix units; float32 is not rounded to TF32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    total = tl.zeros([INPUTS, ROWS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        part = tl.load(
            x + which[:, None] * cols + col[None, :],
            mask=(which[:, None] < inputs) & (col[None, :] < cols),
            other=0.0,
        )
        weights = _tile(
            codes, scale, second_codes, second_scale, offset, row, col, rows, cols,
            row_bytes, scale_step, group_size, HAS_SECOND, HAS_OFFSET,
        )  # fmt: skip
        total = tl.dot(part, tl.trans(weights.to(part.dtype)), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + which[:, None] * rows + row[None, :],
        total.to(out.dtype.element_ty),
        mask=(which[:, None] < inputs) & (row[None, :] < rows),
    )
