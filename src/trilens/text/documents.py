"""Text to measure on: documents from files."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trilens.errors import TextError
from trilens.io.guarded import read_bytes
from trilens.io.json import parse_json
from trilens.io.paths import as_path
from trilens.text.parquet import parquet_texts
from trilens.text.structured import csv_texts, json_texts, text_of

__all__ = ["STDLIB", "read_documents", "text_files"]

STDLIB = "stdlib"
"""The word for the running Python's own standard library, a text that is always there."""

_LIMIT_BYTES = 4_000_000_000
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".text", ".html", ""})
_SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "__pycache__"})


def read_documents(source: str | os.PathLike[str], *, field: str = "text") -> tuple[str, ...]:
    """Read the documents of a file, a folder, or the standard library.

    Args:
        source: a ``.jsonl`` file (one JSON object or string a line), a ``.json`` file (a list of
            such), a ``.parquet`` or ``.csv`` file (one row a document), any other UTF-8 text file
            (one document), a folder (every file of these kinds under it, in the order of their
            paths, but for JSON and CSV, which are as often no text), or the word ``stdlib``.
        field: the column or key that holds the text, in JSON, Parquet and CSV.

    Returns:
        Documents that hold something besides white space.

    Raises:
        TextError: nothing is there, it is no readable text, it holds no document, or it expands
            to more than 100 times its size.
        UsageError: a path that no file system has.
    """
    path = as_path(source, "text")
    if str(source) == STDLIB and not path.exists():
        found = list(_stdlib_documents())
    elif path.is_dir():
        found = [text for file in text_files(path) for text in _file_documents(file, field)]
    elif path.is_file():
        found = list(_file_documents(path, field))
    else:
        raise TextError(
            f"no text at {source}: give a .txt, .jsonl, .json, .csv or .parquet file, a folder of "
            f"them, or the word {STDLIB}"
        )
    documents = tuple(text for text in found if text.strip())
    if not documents and path.is_dir():
        raise TextError(
            f"{source} holds no text: no .txt, .md, .rst, .py, .text, .html, .jsonl or .parquet "
            "file with something in it; name a .json or .csv file itself"
        )
    if not documents:
        raise TextError(f"{source} holds no text: every document is empty")
    return documents


def text_files(folder: Path) -> list[Path]:
    """The files of a folder that are read as text, in the order of their paths."""
    kinds = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in kinds
    )


def _file_documents(file: Path, field: str) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from _jsonl_documents(file, field)
    elif suffix == ".parquet":
        yield from parquet_texts(file, field)
    elif suffix == ".json":
        yield from json_texts(_read_text(file), str(file), field)
    elif suffix == ".csv":
        yield from csv_texts(_read_text(file), str(file), field)
    else:
        yield _read_text(file)


def _read_text(file: Path) -> str:
    try:
        text = read_bytes(file, TextError, max_bytes=_LIMIT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: byte {error.start} does not decode") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl_documents(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(_read_text(file)), start=1):
        if not line.strip():
            continue
        entry: Any = parse_json(line, f"{file}, line {number}", TextError, non_finite=True)
        yield text_of(entry, f"{file}, line {number}", field)


def _lines(text: str) -> Iterator[str]:
    """Lines as JSONL has them: `splitlines` would cut at U+2028, U+0085 and others in strings."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def _stdlib_documents() -> Iterator[str]:
    """The standard library's modules in the order of their paths, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts):
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few old modules carry another encoding
