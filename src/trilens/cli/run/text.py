"""The text behind an option of the command line: a file, a folder, or one of two words."""

from __future__ import annotations

from pathlib import Path

from trilens.demo.corpus import checked_heldout_documents
from trilens.errors import UsageError
from trilens.text.documents import read_documents

__all__ = ["DEMO", "documents_of", "named_text"]

DEMO = "demo"
"""The word for the text that the demo models were not trained on."""


def documents_of(source: str, *, field: str = "text") -> tuple[str, ...]:
    """Read the documents of an option; a file of that name comes before a word.

    Args:
        source: a file, a folder, ``stdlib`` or ``demo``.
        field: the column or key that holds the text, in JSONL and Parquet.

    Raises:
        TextError: as `read_documents`.
        UsageError: this Python has none of the demo's held-out modules.
    """
    if source == DEMO and not Path(source).exists():
        return tuple(document.text for document in checked_heldout_documents())
    return read_documents(source, field=field)


def named_text(given: str) -> tuple[str, str]:
    """Name and source of `[NAME=]TEXT`; a file of that whole name comes first.

    Raises:
        UsageError: nothing stands before or after the sign.
    """
    name, sign, source = given.partition("=")
    if not sign or Path(given).exists():
        return Path(given).name, given
    if not name or not source:
        raise UsageError(f"--evaluate {given!r} is no text: give NAME=TEXT, or the text alone")
    return name, source
