"""A safetensors file of an output: written at known places, read back, hashed."""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trilens.errors import CorruptFileError, WriteError
from trilens.io.atomic import AtomicFile
from trilens.io.guarded import open_regular
from trilens.io.messages import reason

__all__ = ["DTYPE_BYTES", "MappedFile", "ShardSlot", "ShardWriter"]

DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4}
DTYPE_BYTES |= {"F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of one number; every dtype that is not here has 1 or less."""

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class ShardSlot:
    """Where a tensor lies in a file that is being written; bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class MappedFile:
    """A file's bytes as an array, read from disk only where they are looked at.

    The mapping is private: what is written to the array stays in memory. Its pages belong to the
    file and can be dropped by the system at any time.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open_regular(path) as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as cause:
            raise CorruptFileError(f"{path} cannot be read: {reason(cause)}") from cause

    def bytes(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Shapes: → [end − begin]."""
        if begin == end:
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(self._map, dtype=np.uint8, count=end - begin, offset=begin)


class ShardWriter:
    """One safetensors file, written at known places, read back, and renamed when it is whole.

    Use as a context manager; without `commit` the file is removed.

    Args:
        path: the file's place.
        entries: name, dtype and shape of each tensor. They are stored by falling size of their
            numbers, so that each lies at a multiple of that size.

    Raises:
        WriteError: the file cannot be made.
    """

    def __init__(
        self, path: Path, entries: Sequence[tuple[str, str, tuple[int, ...], int]]
    ) -> None:
        self._header, self.slots = _layout(entries)
        self._file = AtomicFile(path)

    def put(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write bytes at an offset and read them back.

        Raises:
            WriteError: no space, or other bytes came back.
        """
        flat = np.ascontiguousarray(data).reshape(-1)
        for start in range(0, flat.size, _CHUNK_BYTES):
            part = flat[start : start + _CHUNK_BYTES].tobytes()
            self._file.put(part, offset + start)
            if self._file.get(len(part), offset + start) != part:
                raise WriteError(
                    f"{self._file.path} does not hold what was written to it: check the disk"
                )

    def get(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes as the file now holds them.

        Shapes: → [size]
        """
        return np.frombuffer(self._file.get(size, offset), dtype=np.uint8)

    def commit(self) -> str:
        """Flush to disk, rename, and give the hash of the content.

        Raises:
            WriteError: as the system reports.
        """
        digest = self._file.sha256
        self._file.commit()
        return digest

    def __enter__(self) -> Self:
        try:
            self.put(0, np.frombuffer(self._header, dtype=np.uint8))
        except WriteError:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _layout(
    entries: Sequence[tuple[str, str, tuple[int, ...], int]],
) -> tuple[bytes, dict[str, ShardSlot]]:
    ordered = sorted(entries, key=lambda entry: -DTYPE_BYTES.get(entry[1], 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
