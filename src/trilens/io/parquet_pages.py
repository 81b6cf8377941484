"""How large the pages of a Parquet column become, read from their headers before any is expanded.

The footer's own sizes may say anything; a reader allocates what the page headers say.

Source: Apache Parquet's `parquet.thrift`, in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Page", "page_headers"]

_DICTIONARY = 2
_TYPE, _EXPANDED, _STORED = 1, 2, 3
_MOST_DEPTH = 8
# Kinds of the compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = frozenset({4, 5, 6})


@dataclass(frozen=True, slots=True)
class Page:
    """One page: whether it is a dictionary, and its bytes when it is expanded."""

    is_dictionary: bool
    size_bytes: int


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
            raise ValueError("a page header is cut off")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in a page header is too long")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def integers(self, depth: int = 0) -> dict[int, int]:
        """A struct's integer fields; the others are skipped."""
        found: dict[int, int] = {}
        field = 0
        while (head := self.byte()) != _STOP:
            field = field + (head >> 4) if head >> 4 else self.zigzag()
            kind = head & 0x0F
            if kind in _INTEGERS:
                found[field] = self.zigzag()
            else:
                self.skip(kind, depth)
        return found

    def skip(self, kind: int, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise ValueError("a page header is nested too deep")
        if kind in {_TRUE, _FALSE}:
            return
        if kind in _INTEGERS:
            self.varint()
        elif kind == _STRUCT:
            self.integers(depth + 1)
        elif kind in {_LIST, _SET}:
            head = self.byte()
            inner = head & 0x0F
            for _ in range(head >> 4 if head >> 4 < 15 else self.varint()):
                self.skip(_BYTE if inner in {_TRUE, _FALSE} else inner, depth + 1)
        elif kind in {_BYTE, _DOUBLE, _BINARY}:
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind)
            length = self.varint() if length is None else length
            self.at += length
            if self.at > len(self.data):
                raise ValueError("a page header is cut off")
        else:
            raise ValueError("a page header holds a kind that is not known")
