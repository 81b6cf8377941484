"""Text of others inside a Markdown file: it stays text, no heading, link, HTML or new cell."""

from __future__ import annotations

import re

from trilens.printable import one_line

__all__ = ["markdown_code", "markdown_text"]

# What is an address by itself becomes none once a backslash stands in it.
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>|&~$@]|(?<=www)\.|:(?=//)|^\s*(?:[-+#=>]|\d+(?=[.)]))")
_NAME_LIMIT = 300


def markdown_text(text: str) -> str:
    """Words in a paragraph, a list or a cell of a table, marks of Markdown with a backslash."""
    return _SPECIAL.sub(_with_backslash, one_line(text))


def markdown_code(text: str) -> str:
    """A name as code, also in a cell of a table; one with a backtick or a bar as HTML's code."""
    name = one_line(text, _NAME_LIMIT)
    if not re.search(r"[`|\\]", name) and name.strip() == name and name:
        return f"`{name}`"
    return f"<code>{''.join(map(_entity, name))}</code>"


def _with_backslash(match: re.Match[str]) -> str:
    found = match[0]
    return f"{found}\\" if found[-1].isdigit() else f"{found[:-1]}\\{found[-1]}"


def _entity(char: str) -> str:
    return char if char.isalnum() or char in " -." else f"&#{ord(char)};"
