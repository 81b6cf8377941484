"""Tables in the project's pages, each between two marks; the words around them stay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["replace_tables", "shown_tables", "table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def shown_tables(text: str) -> dict[str, str]:
    """What stands between the marks of a page, by their names."""
    pattern = r"<!-- ([\w -]+): begin -->\n(.*?)\n?<!-- \1: end -->"
    return dict(re.findall(pattern, text, re.DOTALL))


def replace_tables(page: Path, made: Mapping[str, str]) -> None:
    """Put each table between its two marks.

    Raises:
        SystemExit: the page lacks a table's marks, or has marks that no table fills.
    """
    text = page.read_text(encoding="utf-8")
    odd = sorted(set(shown_tables(text)) ^ set(made))
    if odd:
        raise SystemExit(f"{page.name}: marks and tables differ: {', '.join(odd)}")
    for name, content in made.items():
        new = f"<!-- {name}: begin -->\n{content}\n<!-- {name}: end -->"
        pattern = f"<!-- {name}: begin -->.*?<!-- {name}: end -->"
        text = re.sub(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
