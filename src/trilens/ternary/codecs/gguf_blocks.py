"""GGUF's ternary block formats: codes and a float16 scale for every block of a row.

    name   weights  bytes  bits per weight  layout of a block
    TQ1_0  256      54     1.6875           48 bytes of five trits, 4 bytes of four, scale
    TQ2_0  256      66     2.0625           2 × 32 bytes, of weights j + 0, 32, 64, 96 each; scale
    Q2_0   64       18     2.25             scale; 16 bytes of four in order, also of the level 2

Source: llama.cpp, `ggml-quants.c` and `ggml-common.h` (types 34, 35 and 42).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.errors import CorruptFileError, ShapeError, UsageError, ValueRangeError
from trilens.ternary.codecs.packing import (
    Base3,
    BitNet,
    Codec,
    Data,
    FourLevels,
    Trits,
    TwoBit,
    Unpacked,
    as_bytes,
    as_trits,
    check_multiples,
    rows_and_cols,
    stacked,
)

__all__ = ["CODECS", "Q2", "TQ1", "TQ2", "find_codec"]


class _Blocks:
    """What the block formats share: everything but the order of the codes in a block."""

    name: str
    scale_block: int
    block_bytes: int
    scale_at: int
    row_multiple = 1
    levels = 3

    def __init_subclass__(
        cls, *, name: str, scale_block: int, block_bytes: int, scale_at: int
    ) -> None:
        cls.name, cls.scale_block = name, scale_block
        cls.block_bytes, cls.scale_at = block_bytes, scale_at

    @property
    def col_multiple(self) -> int:
        """The length of a row must be a multiple of a block."""
        return self.scale_block

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, with its share of the block's scale."""
        return 8 * self.block_bytes / self.scale_block

    def size_bytes(self, shape: Sequence[int]) -> int:
        """How many bytes the weights of this shape take."""
        check_multiples(self, *rows_and_cols(shape))
        return math.prod(shape) // self.scale_block * self.block_bytes

    def encode(self, trits: Trits, scales: Any = None) -> NDArray[np.uint8]:
        """Trits and their scales to bytes.

        Shapes: trits [*shape], scales one number or broadcastable to [rows, blocks of a row] (see
        `Units.per_block`) → [rows, bytes of a row]

        Raises:
            DtypeError, ValueRangeError: no trits; see `as_trits`.
            ShapeError: a row that is no whole number of blocks, or scales that do not fit it.
            ValueRangeError: a scale that float16 does not hold exactly.
            UsageError: no scales.
        """
        checked = as_trits(trits, self.levels)
        rows, cols = rows_and_cols(checked.shape)
        check_multiples(self, rows, cols)
        halves = self._halves(scales, rows, cols // self.scale_block)
        digits = (checked + np.int8(1)).view(np.uint8).reshape(-1, self.scale_block)
        blocks = np.empty((len(digits), self.block_bytes), dtype=np.uint8)
        blocks[:, self.scale_at : self.scale_at + 2] = halves.reshape(-1, 1).view(np.uint8)
        codes = self._pack(digits)
        begin = 2 if self.scale_at == 0 else 0
        blocks[:, begin : begin + codes.shape[1]] = codes
        return blocks.reshape(rows, -1)

    def decode(self, data: Data, shape: Sequence[int]) -> Unpacked:
        """Bytes back to trits and scales.

        Shapes: data [rows, bytes of a row] or flat → trits [*shape], scales [rows, blocks]

        Raises:
            CorruptFileError: a wrong number of bytes, a code that is no trit, or a scale that is
                not finite; says in which block.
            ShapeError: a row that is no whole number of blocks.
        """
        what = f"{self.name} blocks of shape {tuple(shape)}"
        raw = as_bytes(data, self.size_bytes(shape), what).reshape(-1, self.block_bytes)
        halves = np.ascontiguousarray(raw[:, self.scale_at : self.scale_at + 2]).view("<f2")[:, 0]
        self._refuse(~np.isfinite(halves), "has a scale that is NaN or Inf")
        begin = 2 if self.scale_at == 0 else 0
        digits = self._unpack(raw[:, begin : begin + self.block_bytes - 2])
        if self.levels == 3:
            self._refuse(np.any(digits == 3, axis=1), "holds a code that is no trit")
        trits = digits.view(np.int8) - np.int8(1)
        rows, _ = rows_and_cols(shape)
        return Unpacked(trits.reshape(tuple(shape)), halves.astype(np.float32).reshape(rows, -1))

    def _pack(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Shapes: digits [blocks, scale_block] → [blocks, block_bytes − 2]."""
        raise NotImplementedError

    def _unpack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Digits, 3 where a code is no trit.

        Shapes: codes [blocks, block_bytes − 2] → digits [blocks, scale_block]
        """
        raise NotImplementedError

    def _halves(self, scales: Any, rows: int, n_blocks: int) -> NDArray[np.float16]:
        if scales is None:
            raise UsageError(f"{self.name} stores a scale with every block: pass the scales")
        wanted = np.asarray(scales, dtype=np.float64)
        try:
            full = np.broadcast_to(wanted, (rows, n_blocks))
        except ValueError as error:
            raise ShapeError(
                f"scales of shape {wanted.shape} do not fit {rows} rows of {n_blocks} {self.name} "
                "blocks: pass one number, [rows, 1] or [rows, blocks]"
            ) from error
        with np.errstate(over="ignore", under="ignore"):
            halves = full.astype("<f2")
        wrong = np.argwhere((halves != full) | ~np.isfinite(full))
        if wrong.size:
            row, block = (int(i) for i in wrong[0])
            raise ValueRangeError(
                f"scale {full[row, block]:g} of row {row}, block {block} is no float16 value, "
                f"which {self.name} stores: quantize with scale_dtype='float16'"
            )
        return halves

    def _refuse(self, bad: NDArray[np.bool_], problem: str) -> None:
        if bad.any():
            raise CorruptFileError(
                f"{self.name} data is damaged: block {int(np.argmax(bad))} {problem}"
            )


class TQ1(_Blocks, name="TQ1_0", scale_block=256, block_bytes=54, scale_at=52):
    """Five trits a byte: the digits of ceil(q · 256 / 243), the first the most significant."""

    def _pack(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        n = len(digits)
        first = digits[:, :160].reshape(n, 5, 32)
        second = digits[:, 160:240].reshape(n, 5, 16)
        last = digits[:, 240:].reshape(n, 4, 4)
        numbers = np.concatenate([_number(first), _number(second), _number(last) * 3], axis=1)
        # Multiplying such a byte by 3 carries its first digit out; the rest stays exact.
        packed: NDArray[np.uint8] = ((numbers * 256 + 242) // 243).astype(np.uint8)
        return packed

    def _unpack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        n = len(codes)
        found = _FIVE_DIGITS[codes]  # [blocks, 52, 5], 3 in every place where the byte is none
        found[:, 48:][found[:, 48:, 4] != 0] = 3  # the last bytes hold four digits
        return np.concatenate(
            [
                found[:, :32].transpose(0, 2, 1).reshape(n, -1),
                found[:, 32:48].transpose(0, 2, 1).reshape(n, -1),
                found[:, 48:, :4].transpose(0, 2, 1).reshape(n, -1),
            ],
            axis=1,
        )


class TQ2(_Blocks, name="TQ2_0", scale_block=256, block_bytes=66, scale_at=64):
    """Two bits a trit, weights 32 apart in one byte."""

    def _pack(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        parts = digits.reshape(len(digits), 2, 4, 32)
        return stacked(parts.transpose(2, 0, 1, 3)).reshape(len(digits), -1)

    def _unpack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        halves = codes.reshape(len(codes), 2, 1, 32)
        digits = halves >> _SHIFTS[:, None] & np.uint8(3)
        return digits.reshape(len(codes), -1)


class Q2(_Blocks, name="Q2_0", scale_block=64, block_bytes=18, scale_at=0):
    """Two bits a trit in order, scale first. The code 3 is the level 2: four levels fit."""

    levels = 4

    def _pack(self, digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return stacked(digits.reshape(len(digits), 16, 4).transpose(2, 0, 1))

    def _unpack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        digits = codes[:, :, None] >> _SHIFTS & np.uint8(3)
        return digits.reshape(len(codes), -1)


def _number(digits: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Shapes: digits [blocks, places, bytes], most significant first → [blocks, bytes]."""
    number = digits[:, 0].astype(np.uint16)
    for place in range(1, digits.shape[1]):
        number = number * np.uint16(3) + digits[:, place]
    return number


def _digits_of_bytes() -> NDArray[np.uint8]:
    table = np.full((256, 5), 3, dtype=np.uint8)
    for number in range(243):
        table[-(-number * 256 // 243)] = [number // 3**place % 3 for place in (4, 3, 2, 1, 0)]
    return table


_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)
_FIVE_DIGITS = _digits_of_bytes()

CODECS: MappingProxyType[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in (TwoBit(), FourLevels(), Base3(), BitNet(), TQ1(), TQ2(), Q2())}
)
"""Every codec by its name."""


def find_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in CODECS:
        raise UsageError(f"codec {name!r} is unknown: there are {', '.join(CODECS)}")
    return CODECS[name]
