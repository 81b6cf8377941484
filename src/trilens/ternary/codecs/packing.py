"""Exact codecs for trits: what is encoded decodes to the same bits, what is malformed is refused.

A `Codec` turns trits `[rows, cols]` into bytes and back. This file has those that store codes
alone; `blocks` has GGUF's, which store a scale with every block of weights.

    name     bits per weight   layout
    two_bit  2                 four codes 1 + t to a byte in row-major order, lowest bits first
    quad     2                 the same with four levels: the code 3 is +2
    base3    1.6               five digits 1 + t to a byte in row-major order, lowest power first
    bitnet   2                 Hugging Face: byte r holds rows r, r+R, r+2R, r+3R, lowest bits first

In `two_bit` and `base3` the last byte is filled up with the code of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import CorruptFileError, DtypeError, ShapeError, UsageError, ValueRangeError

__all__ = [
    "Base3",
    "BitNet",
    "Codec",
    "Data",
    "FourLevels",
    "Trits",
    "TwoBit",
    "Unpacked",
    "as_bytes",
    "as_trits",
    "check_multiples",
    "rows_and_cols",
    "stacked",
]

Trits: TypeAlias = "Tensor | NDArray[np.int8]"
Data: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.uint8] | Tensor"


@dataclass(frozen=True, slots=True, eq=False)
class Unpacked:
    """What was decoded.

    Attributes:
        trits: int8 [*shape].
        scales: float32 [rows, blocks]; None for codecs that store codes alone.
    """

    trits: NDArray[np.int8]
    scales: NDArray[np.float32] | None


class Codec(Protocol):
    """One layout of trits in bytes. A row is one index of all dimensions but the last."""

    @property
    def name(self) -> str:
        """What the layout is called."""

    @property
    def row_multiple(self) -> int:
        """The number of rows must be a multiple of this."""

    @property
    def col_multiple(self) -> int:
        """The length of a row must be a multiple of this."""

    @property
    def scale_block(self) -> int | None:
        """Weights of a row that share a stored scale; None where no scales are stored."""

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, with its share of the stored scales."""

    @property
    def levels(self) -> int:
        """3: trits alone; 4: the level 2 too."""

    def size_bytes(self, shape: Sequence[int]) -> int:
        """How many bytes the weights of this shape take."""

    def encode(self, trits: Trits, scales: Any = None) -> NDArray[np.uint8]:
        """Trits, and where the layout has them scales, to bytes."""

    def decode(self, data: Data, shape: Sequence[int]) -> Unpacked:
        """Bytes back to trits and scales; refuses what no encoder writes."""


class _Bytes:
    """Some trits to a byte in a row, any shape; the last byte is filled up with zeros."""

    name: str
    bits_per_weight: float
    row_multiple = 1
    col_multiple = 1
    scale_block = None
    in_byte: int
    problem: str
    levels = 3

    def __init_subclass__(cls, *, name: str, in_byte: int, problem: str) -> None:
        cls.name, cls.in_byte, cls.problem = name, in_byte, problem
        cls.bits_per_weight = 8 / in_byte

    def size_bytes(self, shape: Sequence[int]) -> int:
        """How many bytes the weights of this shape take."""
        return -(-math.prod(shape) // self.in_byte)

    def encode(self, trits: Trits, scales: Any = None) -> NDArray[np.uint8]:
        """Shapes: trits [*shape] → [size_bytes].

        Raises:
            DtypeError, ShapeError, ValueRangeError: no trits; see `as_trits`.
            UsageError: scales are given, which this layout does not store.
        """
        _no_scales(self, scales)
        return self._packed(_filled_up(as_trits(trits, self.levels).reshape(-1), self.in_byte))

    def decode(self, data: Data, shape: Sequence[int]) -> Unpacked:
        """Shapes: data [size_bytes] → trits [*shape].

        Raises:
            CorruptFileError: a wrong number of bytes, a byte that is no trits, or a last byte
                filled up with something else than zeros.
        """
        raw = as_bytes(data, self.size_bytes(shape), f"{self.name} codes of shape {tuple(shape)}")
        _refuse(self._wrong(raw), raw, f"{self.name} codes", self.problem)
        return Unpacked(_cut(self._unpacked(raw), shape, self.name), None)

    def _packed(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        raise NotImplementedError

    def _wrong(self, raw: NDArray[np.uint8]) -> NDArray[Any]:
        raise NotImplementedError

    def _unpacked(self, raw: NDArray[np.uint8]) -> NDArray[np.int8]:
        raise NotImplementedError


class TwoBit(_Bytes, name="two_bit", in_byte=4, problem="holds the code 3"):
    """Four trits to a byte, any shape; the code 3 is refused."""

    def _packed(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _fold(digits.view("<u4"))

    def _wrong(self, raw: NDArray[np.uint8]) -> NDArray[Any]:
        return _code_3(raw)

    def _unpacked(self, raw: NDArray[np.uint8]) -> NDArray[np.int8]:
        return _FOUR_TRITS.take(raw).view(np.int8)


class FourLevels(TwoBit, name="quad", in_byte=4, problem=""):
    """Four of the levels −1, 0, 1 and 2 to a byte, any shape; every byte is legal."""

    levels = 4

    def _wrong(self, raw: NDArray[np.uint8]) -> NDArray[Any]:
        return np.zeros(len(raw[:1]), dtype=np.uint8)


class Base3(_Bytes, name="base3", in_byte=5, problem="is no five digits of base 3 (at most 242)"):
    """Five trits to a byte, any shape; a byte of 243 or more is refused."""

    def _packed(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        digits = digits.reshape(-1, 5)
        packed = digits[:, 4].copy()
        for place in (3, 2, 1, 0):
            packed *= np.uint8(3)
            packed += digits[:, place]
        return packed

    def _wrong(self, raw: NDArray[np.uint8]) -> NDArray[Any]:
        return raw >= 3**5

    def _unpacked(self, raw: NDArray[np.uint8]) -> NDArray[np.int8]:
        return _FIVE_TRITS[raw].reshape(-1)


class BitNet:
    """Hugging Face's `bitnet` layout: uint8 [out/4, in]; `weight_scale` is stored apart."""

    name = "bitnet"
    row_multiple = 4
    col_multiple = 1
    scale_block = None
    bits_per_weight = 2.0
    levels = 3

    def size_bytes(self, shape: Sequence[int]) -> int:
        """How many bytes the weights of this shape take."""
        check_multiples(self, *_matrix(shape, self.name))
        return math.prod(shape) // 4

    def encode(self, trits: Trits, scales: Any = None) -> NDArray[np.uint8]:
        """Shapes: trits [out, in] → [out / 4, in].

        Raises:
            DtypeError, ValueRangeError: no trits; see `as_trits`.
            ShapeError: not a matrix, or a number of rows that 4 does not divide.
            UsageError: scales are given, which are stored apart from the codes.
        """
        _no_scales(self, scales)
        checked = as_trits(trits)
        rows, cols = _matrix(checked.shape, self.name)
        check_multiples(self, rows, cols)
        return stacked(_digits(checked).reshape(4, rows // 4, cols))

    def decode(self, data: Data, shape: Sequence[int]) -> Unpacked:
        """Shapes: data [out / 4, in] or flat, shape (out, in) → trits [out, in].

        Raises:
            CorruptFileError: a wrong number of bytes or a code 3.
            ShapeError: not a matrix, or a number of rows that 4 does not divide.
        """
        raw = as_bytes(data, self.size_bytes(shape), f"{self.name} codes of shape {tuple(shape)}")
        _refuse(_code_3(raw), raw, f"{self.name} codes", "holds the code 3")
        return Unpacked(_unstacked(raw).reshape(tuple(shape)), None)


def as_trits(trits: Trits, levels: int = 3) -> NDArray[np.int8]:
    """Trits as a contiguous array `[*shape]`.

    Args:
        trits: −1, 0 and 1.
        levels: 4 where 2 is allowed too.

    Raises:
        DtypeError: not int8.
        ShapeError: 0-D or empty.
        ValueRangeError: something else than these; says what and where.
    """
    array = trits.detach().cpu().numpy() if isinstance(trits, Tensor) else trits
    if array.dtype != np.int8:
        raise DtypeError(f"trits are {array.dtype}: pass int8")
    if array.ndim == 0 or array.size == 0:
        raise ShapeError(f"trits have shape {array.shape}: pass rank 1 or more, not empty")
    array = np.ascontiguousarray(array)
    if array.min() < -1 or array.max() > levels - 2:
        flat = array.reshape(-1)
        first = int(np.flatnonzero((flat < -1) | (flat > levels - 2))[0])
        index = tuple(int(i) for i in np.unravel_index(first, array.shape))
        allowed = "trits are −1, 0 or 1" if levels == 3 else "levels are −1, 0, 1 or 2"
        raise ValueRangeError(f"trit {array[index]} at index {index} is out of range: {allowed}")
    return array


def as_bytes(data: Data, size: int, what: str) -> NDArray[np.uint8]:
    """Bytes as a flat array of the size that the layout has.

    Raises:
        DtypeError: an array or tensor of something else than uint8.
        CorruptFileError: more or fewer bytes.
    """
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy() if data.dtype == torch.uint8 else np.empty(0, np.int8)
    raw = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
    if raw.dtype != np.uint8:
        raise DtypeError(f"{what} are {raw.dtype}: pass bytes or uint8")
    if raw.size != size:
        problem = "cut off" if raw.size < size else "followed by something else"
        raise CorruptFileError(f"{what} take {size} bytes, not {raw.size}: they are {problem}")
    return np.ascontiguousarray(raw).reshape(-1)


def rows_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and length of a row.

    Raises:
        ShapeError: 0-D or empty.
    """
    sizes = tuple(int(n) for n in shape)
    if not sizes or min(sizes) < 1:
        raise ShapeError(f"shape {sizes} holds no weights: pass rank 1 or more, not empty")
    return math.prod(sizes[:-1]), sizes[-1]


def check_multiples(codec: Codec, rows: int, cols: int) -> None:
    """Refuse what a layout cannot hold.

    Raises:
        ShapeError: rows or columns that are no multiple of what the layout needs.
    """
    if cols % codec.col_multiple:
        raise ShapeError(
            f"rows of {cols} weights do not fit {codec.name}: it needs a multiple of "
            f"{codec.col_multiple}; keep the tensor dense or take another layout"
        )
    if rows % codec.row_multiple:
        raise ShapeError(
            f"{rows} rows do not fit {codec.name}: it needs a multiple of {codec.row_multiple}; "
            "keep the tensor dense or take another layout"
        )


def stacked(digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four digits of two bits to a byte, the first in the lowest bits.

    Shapes: digits [4, …] → […]
    """
    packed: NDArray[np.uint8] = digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
    return packed


def _matrix(shape: Sequence[int], layout: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise ShapeError(f"shape {tuple(shape)} does not fit {layout}: it holds matrices")
    return rows_and_cols(shape)


def _no_scales(codec: Codec, scales: Any) -> None:
    if scales is not None:
        raise UsageError(f"{codec.name} stores codes alone: keep the scales apart from them")


def _digits(trits: NDArray[np.int8]) -> NDArray[np.uint8]:
    """1 + t."""
    digits: NDArray[np.uint8] = (trits + np.int8(1)).view(np.uint8)
    return digits


def _filled_up(trits: NDArray[np.int8], multiple: int) -> NDArray[np.uint8]:
    missing = -trits.size % multiple
    return _digits(np.pad(trits, (0, missing)) if missing else trits)


def _fold(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Four digits, a byte each, to two bits each."""
    packed: NDArray[np.uint8] = (words | words >> 6 | words >> 12 | words >> 18).astype(np.uint8)
    return packed


def _unstacked(raw: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Shapes: raw […] → trits [4, …]."""
    digits = np.stack([raw >> shift & 3 for shift in (0, 2, 4, 6)])
    trits: NDArray[np.int8] = digits.view(np.int8) - np.int8(1)
    return trits


def _refuse(
    bad: NDArray[np.bool_] | NDArray[np.uint8], raw: NDArray[np.uint8], what: str, problem: str
) -> None:
    if bad.any():
        first = int(np.argmax(bad != 0))
        raise CorruptFileError(f"{what} are damaged: byte {first} ({raw[first]}) {problem}")


def _code_3(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Not 0 where one of a byte's four codes has both bits set."""
    return raw & (raw >> np.uint8(1)) & np.uint8(0x55)


def _cut(trits: NDArray[np.int8], shape: Sequence[int], layout: str) -> NDArray[np.int8]:
    size = math.prod(shape)
    if trits[size:].any():
        raise CorruptFileError(
            f"{layout} codes are damaged: the last byte holds trits past the end"
        )
    return trits[:size].reshape(tuple(shape))


_BYTES = np.arange(256)
_FOUR_CODES = np.stack([_BYTES >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
_FOUR_TRITS = (
    (_FOUR_CODES - 1).astype(np.int8).view(np.uint32)[:, 0]
)  # one word a byte: one look-up
_FIVE_TRITS = np.stack([_BYTES[:243] // 3**place % 3 - 1 for place in range(5)], axis=1).astype(
    np.int8
)
