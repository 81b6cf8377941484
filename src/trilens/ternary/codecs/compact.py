"""Trits at 1.6 bits: five to a byte along each row, as compact checkpoints store them.

A byte is Σ (1 + tᵢ)·3ⁱ, so it is below 243. A row's last byte is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trilens.ternary.codecs.packing import Base3

__all__ = ["compact_rows", "expand_rows", "is_compact"]

_DIGITS = 243
_FIVE_TRITS = torch.tensor(
    [[byte // 3**power % 3 - 1 for power in range(5)] for byte in range(256)], dtype=torch.int8
)


def compact_rows(trits: Tensor) -> Tensor:
    """Trits to bytes, each row by itself.

    Shapes: trits int8 [..., cols] → uint8 [..., ceil(cols / 5)]

    Raises:
        DtypeError, ShapeError, ValueRangeError: no trits; see `packing.as_trits`.
    """
    missing = -trits.shape[-1] % 5 if trits.ndim else 0
    whole = functional.pad(trits, (0, missing)) if missing else trits
    return torch.from_numpy(Base3().encode(whole)).reshape(*trits.shape[:-1], -1)


def expand_rows(codes: Tensor, cols: int) -> Tensor:
    """Bytes back to trits; what a last byte holds past `cols` is not looked at.

    Shapes: codes uint8 [..., ceil(cols / 5)] → int8 [..., cols]
    """
    table = _FIVE_TRITS.to(codes.device)
    return functional.embedding(codes.int(), table).flatten(-2)[..., :cols]


def is_compact(codes: Tensor) -> bool:
    """Whether every byte stands for five trits.

    Shapes: codes uint8 [...]
    """
    return not bool((codes >= _DIGITS).any())
