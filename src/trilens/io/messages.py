"""How values of files and errors of other libraries are put into a message of one line."""

from __future__ import annotations

__all__ = ["clip", "reason"]


def reason(cause: BaseException) -> str:
    """The class and first words of an exception of another library, in one line."""
    text = " ".join(str(cause).split())
    short = text if len(text) <= 200 else text[:199] + "…"
    return f"{type(cause).__name__}: {short}" if short else type(cause).__name__


def clip(value: object, limit: int = 80) -> str:
    """A value of a file as Python writes it: one line, not longer than a message can bear."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
