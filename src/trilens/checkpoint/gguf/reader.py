"""A GGUF file's header, read strictly: every count is checked before anything is read by it.

The gguf package's own reader trusts the file (a damaged count sends it into a loop of 2⁶³ steps)
and does not know the type Q2_0, so files are read here and its decoder is used on what they hold.

Source: llama.cpp, `docs/gguf.md` and `gguf.cpp`, version 3 of the format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from trilens.checkpoint.gguf.formats import type_bytes
from trilens.errors import CorruptFileError, ModelNotFoundError, ShapeError
from trilens.io.guarded import OpenFile
from trilens.io.messages import clip

__all__ = ["STRING_TYPE", "GgufEntry", "GgufFile", "read_gguf"]

_MAGIC = b"GGUF"
_VERSION = 3
_MOST_DIMENSIONS = 4
STRING_TYPE, _ARRAY = 8, 9
_NUMBERS: MappingProxyType[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_LEAST_BYTES = MappingProxyType({"key": 13, "tensor": 32})
"""Bytes of the shortest entry of a kind; a count that needs more than the file is damaged."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of a file.

    Attributes:
        name: As the engine knows it.
        type_id: The number of its type.
        shape: Rows first, as arrays have it; the file counts the other way.
        begin: First byte in the file.
        end: One past the last.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """A file whose header was read and checked.

    Attributes:
        path: Where it is.
        metadata: Key → number, text, truth value or list of them.
        tensors: Every tensor by its name, in the order of the bytes.
        data_begin: Where the tensors begin.
        content: The bytes.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]
    data_begin: int
    content: OpenFile


def read_gguf(path: Path) -> GgufFile:
    """Read and check a header; no tensor is read.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: no GGUF file of version 3, or one that is damaged; says where.
    """
    if not path.exists():
        raise ModelNotFoundError(f"file {path} does not exist")
    content = OpenFile(path)
    cursor = _Cursor(path, content, content.size_bytes)
    if cursor.take(4) != _MAGIC:
        raise CorruptFileError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.number("I")
    if version != _VERSION:
        raise CorruptFileError(f"{path} has GGUF version {version}: version {_VERSION} is read")
    n_tensors, n_keys = cursor.count("tensor"), cursor.count("key")
    metadata = cursor.named(n_keys, "key", cursor.value)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CorruptFileError(
            f"{path} has general.alignment {clip(alignment)}: a power of two is needed"
        )
    infos = cursor.named(n_tensors, "tensor", cursor.tensor)
    data_begin = _padded(cursor.at, alignment)
    tensors, end = {}, data_begin
    for name, (type_id, shape, offset) in infos.items():
        tensors[name] = _placed(path, name, type_id, shape, data_begin + offset, end)
        end = _padded(tensors[name].end, alignment)
    last = max((entry.end for entry in tensors.values()), default=data_begin)
    if not last <= cursor.size <= end:
        problem = "is truncated" if cursor.size < last else "has bytes that no tensor owns"
        raise CorruptFileError(f"{path} {problem}: expected {end} bytes, it has {cursor.size}")
    return GgufFile(path, metadata, tensors, data_begin, content)


def _placed(
    path: Path, name: str, type_id: int, shape: tuple[int, ...], begin: int, expected: int
) -> GgufEntry:
    try:
        size_bytes = type_bytes(type_id, shape)
    except ShapeError as cause:
        raise CorruptFileError(f"{path} has a malformed tensor {clip(name)}: {cause}") from cause
    if size_bytes is None:
        raise CorruptFileError(
            f"{path} has tensor {clip(name)} of type {type_id}: known are F32, F16, BF16, Q8_0, "
            "Q4_0, TQ1_0, TQ2_0 and Q2_0"
        )
    if begin != expected:
        problem = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
        raise CorruptFileError(
            f"{path} has a malformed header: tensor {clip(name)} {problem} (begins at byte "
            f"{begin}, expected {expected})"
        )
    return GgufEntry(name, type_id, shape, begin, begin + size_bytes)


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Cursor:
    """Reads on from byte to byte, and never past the end."""

    def __init__(self, path: Path, content: OpenFile, size: int) -> None:
        self._path = path
        self._content = content
        self.size = size
        self.at = 0

    def take(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise self._damaged(f"truncated: {n} bytes are needed at byte {self.at}")
        found = self._content.bytes(self.at, self.at + n).tobytes()
        self.at += n
        return found

    def number(self, kind: str) -> Any:
        layout = "<" + kind
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, what: str) -> int:
        n = int(self.number("Q"))
        if n * _LEAST_BYTES[what] > self.size:
            raise self._damaged(f"{n} entries of kind {what} do not fit in {self.size} bytes")
        return n

    def text(self) -> str:
        start = self.at
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise self._damaged(f"the text at byte {start} is not UTF-8") from cause

    def named(self, n: int, what: str, read: Callable[[], _T]) -> dict[str, _T]:
        found: dict[str, _T] = {}
        for _ in range(n):
            name = self.text()
            if name in found:
                raise self._damaged(f"{what} {clip(name)} is there twice")
            found[name] = read()
        return found

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self._plain(kind)
        kind, n = self.number("I"), self.number("Q")
        if kind not in _NUMBERS and kind != STRING_TYPE:
            raise self._damaged(f"an array of kind {kind} is not known")
        if kind == STRING_TYPE:
            if 8 * n > self.size - self.at:
                raise self._damaged(f"{n} texts do not fit in it")
            return [self.text() for _ in range(n)]
        width = struct.calcsize("<" + _NUMBERS[kind])
        raw = self.take(n * width)
        return [value for (value,) in struct.iter_unpack("<" + _NUMBERS[kind], raw)]

    def tensor(self) -> tuple[int, tuple[int, ...], int]:
        n_dimensions = self.number("I")
        if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"a tensor has {n_dimensions} dimensions: 1 to 4 are allowed")
        sizes = tuple(int(self.number("Q")) for _ in range(n_dimensions))
        if min(sizes) < 1 or math.prod(sizes) >= 2**63:
            raise self._damaged(f"a tensor has the sizes {clip(sizes)}")
        return int(self.number("I")), sizes[::-1], int(self.number("Q"))

    def _plain(self, kind: int) -> Any:
        if kind == STRING_TYPE:
            return self.text()
        if kind not in _NUMBERS:
            raise self._damaged(f"a value of kind {kind} is not known")
        return self.number(_NUMBERS[kind])

    def _damaged(self, problem: str) -> CorruptFileError:
        return CorruptFileError(f"{self._path} has a malformed GGUF header: {problem}")
