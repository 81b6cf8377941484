"""Trits to bytes along each row: two bits each in memory, 1.6 where compact checkpoints store them.

A two-bit byte is Σ (1 + tᵢ)·4ⁱ of four trits, a compact one Σ (1 + tᵢ)·3ⁱ of five, so below 243. A
row's last byte is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trilens.ternary.codecs.packing import Base3, FourLevels, TwoBit

__all__ = [
    "compact_rows",
    "expand_rows",
    "holds_code_3",
    "is_compact",
    "pack_rows",
    "unpack_rows",
]

_CODE_3 = 0b01010101
_COMPACT_END = 243
# Of each byte: one look-up for all its trits.
_FOUR_TRITS = torch.tensor(
    [[(byte >> bit & 3) - 1 for bit in (0, 2, 4, 6)] for byte in range(256)], device="cpu"
)
_FIVE_TRITS = torch.tensor(
    [[byte // 3**k % 3 - 1 for k in range(5)] for byte in range(256)], device="cpu"
)


def pack_rows(trits: Tensor, levels: int = 3) -> Tensor:
    """Trits to two-bit codes, each row by itself.

    Shapes: trits int8 [..., cols] → uint8 [..., ceil(cols / 4)]

    Args:
        trits: −1, 0 and 1.
        levels: 4 where 2 is allowed too.

    Raises:
        DtypeError, ShapeError, ValueRangeError: no trits; see `packing.as_trits`.
    """
    return _to_bytes(trits, TwoBit() if levels == 3 else FourLevels())


def unpack_rows(codes: Tensor, cols: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Two-bit codes back to trits; what a last byte holds past `cols` is not looked at.

    Shapes: codes uint8 [..., ceil(cols / 4)] → [..., cols] of `dtype`
    """
    return _to_trits(codes, cols, _FOUR_TRITS, dtype)


def compact_rows(trits: Tensor) -> Tensor:
    """Trits to bytes of five, each row by itself.

    Shapes: trits int8 [..., cols] → uint8 [..., ceil(cols / 5)]

    Raises: as `pack_rows`.
    """
    return _to_bytes(trits, Base3())


def expand_rows(codes: Tensor, cols: int) -> Tensor:
    """Bytes of five back to trits; what a last byte holds past `cols` is not looked at.

    Shapes: codes uint8 [..., ceil(cols / 5)] → int8 [..., cols]
    """
    return _to_trits(codes, cols, _FIVE_TRITS, torch.int8)


def holds_code_3(codes: Tensor) -> bool:
    """Whether any of the two-bit codes is 3: no trit, but the level 2 of four.

    Shapes: codes uint8 [...]
    """
    return bool((codes & (codes >> 1) & _CODE_3).any())


def is_compact(codes: Tensor) -> bool:
    """Whether every byte stands for five trits.

    Shapes: codes uint8 [...]
    """
    return not bool((codes >= _COMPACT_END).any())


def _to_bytes(trits: Tensor, codec: TwoBit | Base3) -> Tensor:
    missing = -trits.shape[-1] % codec.in_byte if trits.ndim else 0
    whole = functional.pad(trits, (0, missing)) if missing else trits
    return torch.from_numpy(codec.encode(whole)).reshape(*trits.shape[:-1], -1)


def _to_trits(codes: Tensor, cols: int, table: Tensor, dtype: torch.dtype) -> Tensor:
    table = table.to(device=codes.device, dtype=dtype)
    return functional.embedding(codes.int(), table).flatten(-2)[..., :cols]
