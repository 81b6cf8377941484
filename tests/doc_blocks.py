"""Code blocks of a Markdown page: found, run as printed, and their output compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Block", "blocks_of", "compare_output", "split_console"]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = r"[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language, its text and its line in the page."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1].strip(), found[2], text[: found.start()].count("\n") + 1)
        for found in _FENCE.finditer(text)
    ]


def split_console(text: str) -> list[tuple[str, str]]:
    """`$ command` lines, each with the output shown under it; a trailing backslash goes on."""
    found: list[tuple[str, str]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            found.append((command.partition("  # ")[0].strip(), ""))
        else:
            command, output = found.pop()
            found.append((command, output + line + "\n"))
    return found


def compare_output(shown: str, printed: str, *, rel: float = 0.1, tolerance: float = 0.05) -> None:
    """The words are equal; numbers are, within `rel` or `tolerance`; `…` stands for anything.

    Numbers of a table come from bfloat16 arithmetic (8 bits), whose roundings differ from
    processor to processor; signed weights of a recurrence are sums that cancel in part.
    """
    parts, numbers = [], []
    for token in re.findall(rf"…|─+|\s+|{_NUMBER}|.", shown.strip(), re.DOTALL):
        if token == "…":
            parts.append(r"[\s\S]*?")
        elif token.startswith("─"):
            parts.append("─+")
        elif token.isspace():
            parts.append(r"\s+")
        elif re.fullmatch(_NUMBER, token):
            parts.append(f"({_NUMBER})")
            numbers.append(token)
        else:
            parts.append(re.escape(token))
    found = re.fullmatch(r"\s*" + "".join(parts) + r"\s*", printed)
    assert found, f"shown:\n{shown}\nprinted:\n{printed}"
    ours = [_number(text) for text in numbers]
    theirs = [_number(text) for text in found.groups()]
    assert ours == pytest.approx(theirs, rel=rel, abs=tolerance)


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))
