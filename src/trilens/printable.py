"""Text of files, models and callers as it may leave the program: no control codes, bounded length.

A name in a checkpoint may hold what a terminal obeys: escape sequences, line breaks, marks that
turn the reading direction. Whatever prints a name passes it through here, once, where it leaves;
JSON has escapes of its own.
"""

from __future__ import annotations

import re

__all__ = [
    "MESSAGE_LIMIT",
    "as_unicode",
    "bounded",
    "escaped",
    "escaped_json",
    "escaped_text",
    "one_line",
]

MESSAGE_LIMIT = 1500
"""Characters of a message, and of a line of text, that anybody reads."""

_WORD_LIMIT = 240
# Of a text that is cut, the beginning says what it is and the end what to do.
_HEAD = 2 / 3

# DEL, C1, bidirectional marks and overrides, line and paragraph separators, lone surrogates.
_BEYOND_ASCII = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[\x00-\x1f{_BEYOND_ASCII}]")
_UNSAFE_IN_JSON = re.compile(f"[{_BEYOND_ASCII}]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escaped(text: str) -> str:
    r"""Text with each character that a terminal obeys as Python writes it: ``\x1b``."""
    return _UNSAFE.sub(_escape, text)


def escaped_text(text: str) -> str:
    """Text of several lines: as `escaped`, with its own line breaks and tabs."""
    return re.sub(r"[^\n\t]+", lambda part: escaped(part[0]), text)


def escaped_json(text: str) -> str:
    r"""JSON that reads as the same values, with the same characters as ``\u009b``."""
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def as_unicode(text: str) -> str:
    r"""Text that can be encoded: a byte of a file name that is no UTF-8 becomes ``\udcff``."""
    return _SURROGATE.sub(_escape, text)


def bounded(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Text of at most so many characters: long words are cut first, then the middle."""
    if len(text) <= limit:
        return text
    # Looking at words costs time for each character: of a text without end the ends are enough.
    text = _without_middle(text, 8 * limit)
    words = re.sub(rf"\S{{{_WORD_LIMIT},}}", lambda word: _without_middle(word[0], 200), text)
    return _without_middle(words, limit)


def one_line(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """One line of bounded length, whatever the text holds."""
    return bounded(escaped(bounded(text, 8 * limit)), limit)


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = int((limit - 1) * _HEAD)
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"
