"""Where each tensor lies in a safetensors file that is to be written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["DTYPE_BYTES", "ShardSlot", "layout"]

DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4}
DTYPE_BYTES |= {"F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of one number; every dtype that is not here has 1 or less."""

_OF_TORCH = MappingProxyType({"format": "pt"})


@dataclass(frozen=True, slots=True)
class ShardSlot:
    """Where a tensor lies in a file that is being written; bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def layout(
    entries: Sequence[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str] = _OF_TORCH,
) -> tuple[bytes, dict[str, ShardSlot]]:
    """The file's head, up to its first tensor, and the place of each tensor.

    Args:
        entries: name, dtype, shape and bytes of each. They are stored by falling size of their
            numbers, so that each lies at a multiple of that size.
        metadata: text by its name.
    """
    ordered = sorted(entries, key=lambda entry: -DTYPE_BYTES.get(entry[1], 1))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, size_bytes in ordered:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + size_bytes],
        }
        end += size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    slots = {}
    for name, dtype, shape, _ in ordered:
        begin, stop = header[name]["data_offsets"]
        slots[name] = ShardSlot(name, dtype, shape, start + begin, start + stop)
    return len(text).to_bytes(8, "little") + text, slots
