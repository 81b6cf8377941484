"""Texts inside JSON and CSV: an entry or a row is a document, its syntax is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from trilens.errors import TextError
from trilens.io.json import parse_json
from trilens.io.messages import listed

__all__ = ["csv_texts", "json_texts", "text_of"]

_LARGEST_CELL = 2**31 - 1


def text_of(entry: Any, where: str, field: str) -> str:
    """The text of one JSON entry: a string, or the object's value under `field`.

    Raises:
        TextError: there is none.
    """
    text = entry.get(field) if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        keys = listed(entry) if isinstance(entry, dict) else type(entry).__name__
        raise TextError(f"{where} has no text under {field!r}: it has {keys}")
    return text


def json_texts(content: str, where: str, field: str) -> Iterator[str]:
    """The texts of a JSON file: a list of entries, one entry, or one entry a line.

    Raises:
        TextError: it is no JSON, or an entry has no text.
    """
    try:
        entries: Any = parse_json(content, where, TextError, non_finite=True)
    except TextError as error:
        lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        try:
            parsed = [(n, parse_json(line, where, TextError, non_finite=True)) for n, line in lines]
        except TextError:
            raise error from None
        yield from (text_of(entry, f"{where}, line {n}", field) for n, entry in parsed)
        return
    if not isinstance(entries, list):
        entries = [entries]
    yield from (text_of(entry, f"{where}, entry {n}", field) for n, entry in enumerate(entries))


def csv_texts(content: str, where: str, field: str) -> Iterator[str]:
    """The column `field` of a CSV file whose first row names the columns.

    Raises:
        TextError: there is no such column, a row has no cell there, or it is no CSV.
    """
    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        names = reader.fieldnames or []
        if field not in names:
            raise TextError(f"{where} has no column {field!r}: its columns are {listed(names)}")
        for row in reader:
            if row[field] is None:
                raise TextError(f"{where}, line {reader.line_num} has no cell under {field!r}")
            yield row[field]
    except csv.Error as error:
        raise TextError(f"{where} is not readable CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
