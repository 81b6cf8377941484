"""Text to measure on: documents from files, and the token blocks that a model reads.

A block never spans two documents, so no token is predicted from a text that is not its own.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trilens.errors import NoTokenizerError, TextError, ValueRangeError

__all__ = ["STDLIB", "read_documents", "token_blocks"]

STDLIB = "stdlib"
"""The word for the running Python's own standard library, a text that is always there."""

_TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".text", ".html", ".json", ".csv", ""})
_SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "__pycache__"})


def read_documents(source: str | Path, *, field: str = "text") -> tuple[str, ...]:
    """Read the documents of a file, a folder, or the standard library.

    Args:
        source: a ``.jsonl`` file (one JSON object or string a line), a ``.parquet`` file (one row a
            document), any other UTF-8 text file (one document), a folder (every file of these
            kinds under it, in the order of their paths), or the word ``stdlib``.
        field: the column or key that holds the text, in JSONL and Parquet.

    Returns:
        Documents that hold something besides white space.

    Raises:
        TextError: nothing is there, it is no readable text, or it holds no document.
    """
    path = Path(source)
    if str(source) == STDLIB and not path.exists():
        found = list(_stdlib_documents())
    elif path.is_dir():
        found = [text for file in _files(path) for text in _file_documents(file, field)]
    elif path.is_file():
        found = list(_file_documents(path, field))
    else:
        raise TextError(
            f"no text at {source}: give a .txt, .jsonl or .parquet file, a folder of them, or the "
            f"word {STDLIB}"
        )
    documents = tuple(text for text in found if text.strip())
    if not documents:
        raise TextError(f"{source} holds no text: every document is empty")
    return documents


def token_blocks(
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[str],
    *,
    length: int,
    limit_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """Cut documents into blocks of token ids.

    Every document is encoded as the tokenizer encodes a prompt, special tokens included. Blocks of
    a document do not overlap; the rest at its end is a shorter block, dropped where it has fewer
    than two tokens and so predicts nothing.

    Shapes
        each block int64 [seq], 2 ≤ seq ≤ length.

    Args:
        tokenizer: the model's own.
        documents: texts.
        length: most tokens of a block.
        limit_tokens: stop once the blocks hold this many tokens; the last block is cut to fit.

    Raises:
        NoTokenizerError: the model came without a tokenizer.
        ValueRangeError: a length or limit below 2.
        TextError: no document gives a block.
    """
    if tokenizer is None:
        raise NoTokenizerError("text needs a tokenizer, and this model came without one")
    if length < 2:
        raise ValueRangeError(
            f"block length is {length}: at least 2 tokens, so that one is predicted"
        )
    if limit_tokens is not None and limit_tokens < 2:
        raise ValueRangeError(
            f"token limit is {limit_tokens}: at least 2, so that one is predicted"
        )
    blocks: list[Tensor] = []
    left = limit_tokens
    for document in documents:
        # verbose=False: a document longer than the model's context is the rule here, not a mishap.
        ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)
        for block in torch.split(ids, length):
            piece = block if left is None else block[:left]
            if len(piece) < 2:
                continue
            blocks.append(piece)
            left = None if left is None else left - len(piece)
        if left is not None and left < 2:
            break
    if not blocks:
        raise TextError(
            f"{len(documents)} documents give no block of 2 tokens or more: give longer text"
        )
    return tuple(blocks)


def _files(folder: Path) -> list[Path]:
    kinds = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in kinds
    )


def _file_documents(file: Path, field: str) -> Iterator[str]:
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from _jsonl_documents(file, field)
    elif suffix == ".parquet":
        yield from _parquet_documents(file, field)
    else:
        yield _read_text(file)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: byte {error.start} does not decode") from None
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror}") from None


def _jsonl_documents(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except ValueError:
            raise TextError(f"{file}, line {number} is not JSON: {line[:40]!r}") from None
        text = entry.get(field) if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            keys = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise TextError(f"{file}, line {number} has no text under {field!r}: it has {keys}")
        yield text


def _parquet_documents(file: Path, field: str) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if field not in names:
            raise TextError(f"{file} has no column {field!r}: its columns are {', '.join(names)}")
        kind = table.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise TextError(f"{file}: column {field!r} holds {kind}, not text")
        for batch in table.iter_batches(columns=[field]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as error:
        raise TextError(f"{file} is not a readable Parquet file: {error}") from None


def _stdlib_documents() -> Iterator[str]:
    """The standard library's modules in the order of their paths, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts):
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few old modules carry another encoding
