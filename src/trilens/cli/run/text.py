"""The text behind an option of the command line: a file, a folder, or one of two words."""

from __future__ import annotations

from pathlib import Path

from trilens.demo.corpus import checked_heldout_documents
from trilens.text.documents import read_documents

__all__ = ["DEMO", "documents_of"]

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
