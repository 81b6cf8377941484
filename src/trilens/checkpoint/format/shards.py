"""A safetensors file of an output: written at known places, read back, hashed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trilens.errors import CorruptFileError, WriteError
from trilens.io.atomic import AtomicFile
from trilens.io.guarded import open_regular
from trilens.io.messages import reason
from trilens.io.safetensors_layout import layout
from trilens.ternary.rules.kernels import parallel_map

__all__ = ["MappedFile", "ShardWriter"]

_CHUNK_BYTES = 1 << 22


class MappedFile:
    """A file's bytes as an array, read from disk only where they are looked at.

    The mapping is private: what is written to the array stays in memory. Its pages belong to the
    file and can be dropped by the system at any time. A file that is cut off meanwhile ends the
    process: map only what must not take memory, and look at its size before each use.
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
        self._header, self.slots = layout(entries)
        self._file = AtomicFile(path)

    def put(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write bytes at an offset and read them back.

        Raises:
            WriteError: no space, or other bytes came back.
        """
        flat = np.ascontiguousarray(data).reshape(-1)

        def write(start: int) -> None:
            part = flat[start : start + _CHUNK_BYTES].tobytes()
            self._file.put(part, offset + start)
            if self._file.get(len(part), offset + start) != part:
                raise WriteError(
                    f"{self._file.path} does not hold what was written to it: check the disk"
                )

        parallel_map(write, range(0, flat.size, _CHUNK_BYTES))

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
        # The disk writes while the processor hashes: what is left to commit is the name.
        digests: list[str] = []

        def take_hash() -> None:
            digests.append(self._file.sha256)

        parallel_map(lambda work: work(), (self._file.flush_to_disk, take_hash))
        self._file.commit()
        return digests[0]

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
