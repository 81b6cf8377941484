"""Where a Parquet column's pages lie and how large they become, before any is expanded.

The footer's own sizes may say anything; a reader allocates what the page headers say. The footer is
read here too: some damage to it ends the process where Arrow looks at a column's entry.

Source: Apache Parquet's `parquet.thrift`, in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Chunk", "Page", "column_chunks", "page_headers"]

_DICTIONARY = 2
_TYPE, _EXPANDED, _STORED = 1, 2, 3
_MOST_DEPTH = 8
# Kinds of the compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = frozenset({4, 5, 6})


# Fields of the footer: row groups, their columns, a column's entry and what is in it.
_GROUPS, _COLUMNS, _ENTRY = 4, 1, 3
_PATH, _CHUNK_BYTES, _DATA, _DICTIONARY_PAGE = 3, 7, 9, 11
_FOOTER_END = 8  # its length and the magic word


class Chunk(NamedTuple):
    """A column's bytes in one row group: its name, where they begin and end."""

    path: str
    begin: int
    end: int


class Page(NamedTuple):
    """One page: whether it is a dictionary, and its bytes when it is expanded."""

    is_dictionary: bool
    size_bytes: int


def column_chunks(data: memoryview) -> Iterator[Chunk]:
    """The columns of every row group, as the footer names them.

    Args:
        data: the file's bytes.

    Raises:
        ValueError: a footer that is damaged.
    """
    end = len(data) - _FOOTER_END
    begin = end - int.from_bytes(data[end : end + 4], "little") if end > 0 else -1
    if begin < 0:
        raise ValueError("the footer is cut off")
    for group in _structs(_Cursor(data[begin:end], 0).struct().get(_GROUPS)):
        for column in _structs(group.get(_COLUMNS)):
            yield _chunk(column.get(_ENTRY), len(data))


def _structs(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("the footer lacks a list of columns")
    return value


def _chunk(entry: Any, size_bytes: int) -> Chunk:
    path = entry.get(_PATH) if isinstance(entry, dict) else None
    if not isinstance(path, list) or not all(isinstance(part, bytes) for part in path):
        raise ValueError("the footer lacks the name of a column")
    begin, dictionary, length = (entry.get(n) for n in (_DATA, _DICTIONARY_PAGE, _CHUNK_BYTES))
    if not isinstance(begin, int) or not isinstance(length, int):
        raise ValueError("the footer lacks the place of a column")
    if isinstance(dictionary, int) and 0 < dictionary < begin:
        begin = dictionary
    if not 0 <= begin <= begin + length <= size_bytes:
        raise ValueError("a column lies outside the file")
    return Chunk(b".".join(path).decode("utf-8", "replace"), begin, begin + length)


def page_headers(data: memoryview) -> Iterator[Page]:
    """The pages of a column chunk.

    Args:
        data: the chunk's bytes.

    Raises:
        ValueError: a header that is damaged.
    """
    at = 0
    while at < len(data):
        cursor = _Cursor(data, at)
        fields = cursor.integers()
        kind, expanded, stored = (fields.get(n, -1) for n in (_TYPE, _EXPANDED, _STORED))
        if min(kind, expanded, stored) < 0:
            raise ValueError("a page header lacks its sizes")
        yield Page(kind == _DICTIONARY, expanded)
        at = cursor.at + stored


class _Cursor:
    """Reads on from byte to byte."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data = data
        self.at = at

    def byte(self) -> int:
        if not 0 <= self.at < len(self.data):
            raise ValueError("a header is cut off")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in a header is too long")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def integers(self) -> dict[int, int]:
        """A struct's integer fields; the others are skipped."""
        return {n: value for n, value in self.struct().items() if isinstance(value, int)}

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """A struct's fields: numbers, bytes, lists and structs."""
        found: dict[int, Any] = {}
        field = 0
        while (head := self.byte()) != _STOP:
            field = field + (head >> 4) if head >> 4 else self.zigzag()
            found[field] = self.value(head & 0x0F, depth)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise ValueError("a header is nested too deep")
        if kind in _INTEGERS:
            return self.zigzag()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in {_LIST, _SET}:
            head = self.byte()
            inner = head & 0x0F
            inner = _BYTE if inner in {_TRUE, _FALSE} else inner
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind in {_BYTE, _DOUBLE, _BINARY}:
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind)
            return self.take(self.varint() if length is None else length)
        if kind in {_TRUE, _FALSE}:
            return None
        raise ValueError("a header holds a kind that is not known")

    def take(self, length: int) -> bytes:
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a header is cut off")
        return bytes(self.data[self.at - length : self.at])
