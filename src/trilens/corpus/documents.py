"""The documents of a corpus, one at a time: JSONL, chats, text, tables, standard input."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from trilens.errors import TextError, TrilensError, UsageError
from trilens.io.guarded import open_regular
from trilens.io.json import parse_json, parse_object
from trilens.io.messages import clip, listed, reason
from trilens.io.paths import as_path
from trilens.models.encoded import is_messages
from trilens.text.documents import read_documents, text_files
from trilens.text.parquet import parquet_texts
from trilens.text.structured import text_of

__all__ = ["CorpusDocument", "ReadingReport", "read_corpus"]

STDIN = "-"
_MESSAGES = "messages"
_LINE_LIMIT_BYTES = 1 << 30
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class CorpusDocument:
    """One document.

    Attributes:
        content: text, chat messages, or token ids.
        where: where it stands in its source.
        label: its class, for class means; None for none.
    """

    content: Any
    where: str
    label: str | None = None


@dataclass(slots=True)
class ReadingReport:
    """What was left out of a corpus while it was read.

    Attributes:
        empty: entries without text.
        bad: entries that could not be read.
        examples: what was wrong with the first of them.
        digest: hash of every document, in order.
    """

    empty: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def refuse(self, error: TrilensError, *, strict: bool) -> None:
        """Count a bad entry, or raise."""
        if strict:
            raise error
        self.bad += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(error))


def read_corpus(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    field: str = "text",
    label: str | None = None,
    strict: bool = False,
    report: ReadingReport | None = None,
) -> Iterator[CorpusDocument]:
    """Read the documents of a corpus, holding one at a time.

    Args:
        source: a ``.jsonl`` file (a string, an object with text, or a chat under ``messages`` a
            line), ``-`` for standard input (JSONL where its first line is JSON, else one text), a
            ``.parquet``, ``.csv``, ``.json`` or text file, a folder that ``datasets`` saved, a
            folder of such files, ``stdlib``; or documents: texts, chats, token ids,
            `CorpusDocument`.
        field: key or column of the text.
        label: key or column of the document's class, in JSONL and ``datasets`` folders.
        strict: raise at the first entry that cannot be read; else it is counted.
        report: counts what was left out.

    Raises:
        TextError: nothing is there, no document is in it, or a bad entry with `strict`.
        UsageError: a source that is none.
    """
    found = ReadingReport() if report is None else report
    keys = _Keys(field, label)
    any_left = False
    for document in _documents(source, keys, found, strict):
        if isinstance(document.content, str) and not document.content.strip():
            found.empty += 1
            continue
        any_left = True
        found.digest.update(_line(document))
        yield document
    if not any_left:
        left_out = f": {found.bad} entries could not be read, {found.empty} are empty"
        first = f"; the first: {found.examples[0]}" if found.examples else ""
        raise TextError(f"the corpus holds no document{left_out}{first}")


@dataclass(frozen=True, slots=True)
class _Keys:
    text: str
    label: str | None

    def document(self, entry: Any, where: str) -> CorpusDocument:
        """The document of one entry of JSONL, or row of a table."""
        label = None
        if isinstance(entry, Mapping):
            if self.label is not None:
                if entry.get(self.label) is None:
                    raise TextError(f"{where} has no label under {self.label!r}")
                label = str(entry[self.label])
            messages = entry.get(_MESSAGES)
            if messages is not None and self.text not in entry:
                if not is_messages(messages):
                    raise TextError(f"{where} has no chat under 'messages': {clip(messages)}")
                return CorpusDocument(messages, where, label)
        return CorpusDocument(text_of(entry, where, self.text), where, label)


def _line(document: CorpusDocument) -> bytes:
    content = document.content
    if not isinstance(content, str) and not is_messages(content):
        content = [int(each) for each in content]
    line = json.dumps([content, document.label], ensure_ascii=True, default=str)
    return line.encode() + b"\n"


def _documents(
    source: Any, keys: _Keys, report: ReadingReport, strict: bool
) -> Iterator[CorpusDocument]:
    if not isinstance(source, str | os.PathLike):
        yield from _given(source)
        return
    if source == STDIN:
        yield from _standard_input(keys, report, strict)
        return
    path = as_path(source, "corpus")
    if path.is_dir() and (path / "state.json").is_file():
        yield from _arrow_rows(path, keys, report, strict)
    elif path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        raise TextError(f"{path} holds several splits: give the folder of one of {listed(splits)}")
    elif path.is_dir():
        for file in text_files(path):
            yield from _file(file, keys, report, strict)
    else:
        yield from _file(path, keys, report, strict)


def _given(source: Any) -> Iterator[CorpusDocument]:
    if not isinstance(source, Iterable) or is_messages(source):
        raise UsageError(
            f"corpus is one {type(source).__name__}: give a path, or a list of documents"
        )
    for number, each in enumerate(source):
        where = f"document {number}"
        yield each if isinstance(each, CorpusDocument) else CorpusDocument(each, where)


def _file(path: Path, keys: _Keys, report: ReadingReport, strict: bool) -> Iterator[CorpusDocument]:
    if path.suffix.lower() == ".jsonl" and path.is_file():
        with open_regular(path, TextError) as stream:
            yield from _json_lines(stream, str(path), keys, report, strict)
        return
    if keys.label is not None:
        raise TextError(f"{path} has no labels: they are read from JSONL and datasets folders")
    if path.suffix.lower() == ".parquet" and path.is_file():
        texts: Iterable[str] = parquet_texts(path, keys.text)
    else:
        texts = read_documents(path, field=keys.text)
    for number, text in enumerate(texts):
        yield CorpusDocument(text, f"{path.name}, row {number}")


def _json_lines(
    stream: BinaryIO, where: str, keys: _Keys, report: ReadingReport, strict: bool
) -> Iterator[CorpusDocument]:
    name = Path(where).name
    number = 0
    while line := stream.readline(_LINE_LIMIT_BYTES):
        number += 1
        if not line.strip():
            continue
        at = f"{name}, line {number}"
        try:
            entry = parse_json(line, at, TextError, non_finite=True)
            yield keys.document(entry, at)
        except TextError as error:
            report.refuse(error, strict=strict)


def _standard_input(keys: _Keys, report: ReadingReport, strict: bool) -> Iterator[CorpusDocument]:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise UsageError("standard input is closed: pipe the corpus into it, or name a file")
    first = stream.readline(_LINE_LIMIT_BYTES)
    if first.lstrip()[:1] in {b"{", b'"'}:
        yield from _json_lines(_Again(first, stream), "stdin", keys, report, strict)  # type: ignore[arg-type]
        return
    try:
        text = (first + stream.read()).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise TextError(f"standard input is not UTF-8 text: byte {cause.start}") from None
    yield CorpusDocument(text, "stdin")


class _Again:
    """A stream whose first line was read already."""

    def __init__(self, first: bytes, stream: BinaryIO) -> None:
        self._first, self._stream = first, stream

    def readline(self, limit: int) -> bytes:
        line, self._first = self._first, b""
        return line or self._stream.readline(limit)


def _arrow_rows(
    folder: Path, keys: _Keys, report: ReadingReport, strict: bool
) -> Iterator[CorpusDocument]:
    """Rows of a folder that `datasets` saved: its files are Arrow streams."""
    with open_regular(folder / "state.json", TextError) as file:
        state = parse_object(file.read(1 << 24), str(folder / "state.json"), TextError)
    names = [each.get("filename") for each in state.get("_data_files") or [] if each]
    number = 0
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise TextError(f"{folder} names the file {clip(name)}: plain names are allowed")
        for rows in _batches(folder / name):
            for row in rows():
                at = f"{folder.name}, row {number}"
                number += 1
                try:
                    yield keys.document(row, at)
                except TextError as error:
                    report.refuse(error, strict=strict)


def _batches(path: Path) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    try:
        with open_regular(path, TextError) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch.to_pylist
    except (pa.ArrowException, OSError, ValueError) as cause:
        raise TextError(f"{path} is not a readable Arrow stream: {reason(cause)}") from None
