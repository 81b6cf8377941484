"""Storing the nonzero trits alone, where that is truly smaller than codes for all of them.

Compressed sparse rows, little-endian, in this order:

    row ends   uint32 [rows]       nonzero trits up to and with this row; uint64 from 2³² weights on
    columns    uint16 [nonzero]    ascending in each row; uint32 for rows longer than 65,536
    signs      1 bit each          1 for −1, lowest bit first, the last byte filled up with 0

A nonzero trit costs 17 bits (33 in longer rows) and a row 32, so rows of 4,096 weights are smaller
than two-bit codes above 88.3 % zeros and smaller than base 3 above 90.6 %. The rules that need no
data leave 30 to 50 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.errors import CorruptFileError
from trilens.ternary.codecs.packing import (
    Codec,
    Data,
    Trits,
    TwoBit,
    as_bytes,
    as_trits,
    rows_and_cols,
)

__all__ = ["Smallest", "csr_size_bytes", "decode_csr", "encode_csr", "encode_smallest"]


def csr_size_bytes(rows: int, cols: int, n_nonzero: int) -> int:
    """Bytes of the nonzero trits alone."""
    of_row, of_column = _widths(rows, cols)
    return rows * of_row.itemsize + n_nonzero * of_column.itemsize + -(-n_nonzero // 8)


def encode_csr(trits: Trits) -> NDArray[np.uint8]:
    """Trits to compressed sparse rows; a row is one index of all dimensions but the last.

    Shapes: trits [*shape] → [csr_size_bytes]

    Raises:
        DtypeError, ShapeError, ValueRangeError: no trits; see `packing.as_trits`.
    """
    checked = as_trits(trits)
    rows, cols = rows_and_cols(checked.shape)
    table = checked.reshape(rows, cols)
    of_row, of_column = _widths(rows, cols)
    ends = np.cumsum(np.count_nonzero(table, axis=1)).astype(of_row)
    _, columns = np.nonzero(table)  # row by row, ascending
    signs = np.packbits(table[table != 0] < 0, bitorder="little")
    parts = (ends, columns.astype(of_column), signs)
    return np.concatenate([part.view(np.uint8) for part in parts])


def decode_csr(data: Data, shape: Sequence[int]) -> NDArray[np.int8]:
    """Compressed sparse rows back to trits.

    Shapes: data [csr_size_bytes], flat → [*shape]

    Raises:
        CorruptFileError: a wrong number of bytes, row ends that fall, columns that do not ascend or
            lie outside, or bits after the last sign.
        DtypeError: an array of something else than uint8.
        ShapeError: a shape that holds no weights.
    """
    rows, cols = rows_and_cols(shape)
    of_row, of_column = _widths(rows, cols)
    what = f"sparse trits of shape {tuple(shape)}"
    raw = as_bytes(data, _size_of(data), what)
    head = rows * of_row.itemsize
    if raw.size < head:
        raise CorruptFileError(f"{what} are cut off: {raw.size} bytes, the row ends take {head}")
    ends = raw[:head].view(of_row).astype(np.uint64)
    n_nonzero = int(ends[-1])
    counts = ends.astype(np.int64)
    counts[1:] -= counts[:-1].copy()
    if n_nonzero > rows * cols or counts.min() < 0 or counts.max() > cols:
        raise CorruptFileError(f"{what} are damaged: row ends must rise by 0–{cols}")
    raw = as_bytes(raw, csr_size_bytes(rows, cols, n_nonzero), what)
    split = head + n_nonzero * of_column.itemsize
    columns = raw[head:split].copy().view(of_column).astype(np.int64)
    bits = np.unpackbits(raw[split:], bitorder="little")
    row_of = np.repeat(np.arange(rows), counts)
    places = row_of * cols + columns
    # One comparison for both: within a row columns ascend, and the next row lies higher anyway.
    if n_nonzero and (columns.max() >= cols or np.any(np.diff(places) <= 0)):
        raise CorruptFileError(
            f"{what} are damaged: columns must ascend in each row and lie in 0–{cols - 1}"
        )
    if bits[n_nonzero:].any():
        raise CorruptFileError(f"{what} are damaged: the last byte holds signs past the end")
    trits = np.zeros(rows * cols, dtype=np.int8)
    trits[places] = 1 - 2 * bits[:n_nonzero].astype(np.int8)
    return trits.reshape(tuple(shape))


@dataclass(frozen=True, slots=True, eq=False)
class Smallest:
    """Trits in whichever layout takes fewer bytes.

    Attributes:
        layout: "csr", or the name of the dense codec.
        data: uint8, flat; decoded and compared already.
    """

    layout: str
    data: NDArray[np.uint8]


def encode_smallest(trits: Trits, dense: Codec | None = None) -> Smallest:
    """Sparse rows where they take fewer bytes than the dense codec, else that codec.

    Args:
        trits: int8 [*shape].
        dense: a codec that stores codes alone; two bits for each trit where not given.

    Raises:
        DtypeError, ShapeError, ValueRangeError: no trits, or a shape that the codec cannot hold.
    """
    codec = dense or TwoBit()
    checked = as_trits(trits)
    rows, cols = rows_and_cols(checked.shape)
    needed = csr_size_bytes(rows, cols, int(np.count_nonzero(checked)))
    if needed < codec.size_bytes(checked.shape):
        data = encode_csr(checked)
        same = np.array_equal(decode_csr(data, checked.shape), checked)
        layout = "csr"
    else:
        data = codec.encode(checked).reshape(-1)
        same = np.array_equal(codec.decode(data, checked.shape).trits, checked)
        layout = codec.name
    if not same:
        raise CorruptFileError(f"{layout} codes do not decode to the trits they were made from")
    return Smallest(layout, data)


def _widths(rows: int, cols: int) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """The numbers that row ends and columns are stored as."""
    of_row = np.dtype("<u4") if rows * cols < 1 << 32 else np.dtype("<u8")
    return of_row, np.dtype("<u2") if cols <= 1 << 16 else np.dtype("<u4")


def _size_of(data: Data) -> int:
    """Its own number of bytes: how many there must be stands in the row ends."""
    if isinstance(data, bytes | bytearray):
        return len(data)
    if isinstance(data, memoryview):
        return data.nbytes
    return math.prod(data.shape)
