"""How values of files, lists and errors of other libraries are put into a message of one line."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from trilens.printable import bounded, escaped

__all__ = ["clip", "in_blocks", "listed", "other_version", "reason"]

_NAME_LIMIT = 120


def reason(cause: BaseException) -> str:
    """The class and first words of an exception of another library, in one line."""
    text = " ".join(str(cause).split())
    short = text if len(text) <= 200 else text[:199] + "…"
    return f"{type(cause).__name__}: {short}" if short else type(cause).__name__


def clip(value: object, limit: int = 80) -> str:
    """A value of a file as Python writes it: one line, not longer than a message can bear."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def other_version(what: str, found: object, newest: int, *, oldest: int | None = None) -> str:
    """Why a file of ours is not read, and what to do: a newer one needs a newer trilens.

    Args:
        what: the file and its kind, before the word "version".
        found: what it says.
        newest: the version that is read.
        oldest: where older ones are read too, the first of them.
    """
    is_newer = isinstance(found, int) and not isinstance(found, bool) and found > newest
    do = "install a newer trilens" if is_newer else "write it again"
    is_one = oldest is None or oldest == newest
    read = f"version {newest}" if is_one else f"versions {oldest} to {newest}"
    return f"{what} version {clip(found)}: this trilens reads {read}; {do}"


def in_blocks(length: int | None) -> str:
    """How a text was cut, which its perplexity depends on, to follow "tokens": "" if unknown."""
    return "" if length is None else f" in blocks of up to {length}"


def listed(names: Iterable[object], shown: int = 4, *, nothing: str = "none") -> str:
    """The first names and how many there are beyond them: ``a, b, c and 7 more``.

    Args:
        names: as `str` writes them; long ones are cut.
        shown: how many are named.
        nothing: the word for an empty list.
    """
    rest = iter(names)
    first = [bounded(escaped(str(name)), _NAME_LIMIT) for name in islice(rest, shown)]
    more = sum(1 for _ in rest)
    return (", ".join(first) or nothing) + (f" and {more} more" if more else "")
