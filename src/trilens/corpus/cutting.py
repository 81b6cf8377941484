"""From documents to shards of token ids: cut once, before any model runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from trilens.corpus.documents import CorpusDocument, ReadingReport
from trilens.corpus.manifest import CorpusCounts
from trilens.corpus.names import DOCUMENTS_NAME, tokens_name
from trilens.corpus.options import StoreOptions
from trilens.errors import (
    NoChatTemplateError,
    NoTokenizerError,
    PromptError,
    TextError,
)
from trilens.io.atomic import atomic
from trilens.io.tensors import read_tensors, write_tensors
from trilens.models.encoded import ids_of_messages, is_messages
from trilens.models.tokens import token_ids_of

__all__ = ["TOKENS_FORMAT", "TOKENS_VERSION", "Cut", "ShardTokens", "cut", "read_tokens"]

TOKENS_FORMAT, TOKENS_VERSION = "trilens.store_tokens", 1
_ROWS = 1 << 14  # documents that are written to the index at once

_SCHEMA = pa.schema(
    [
        ("document", pa.int64()),
        ("first_token", pa.int64()),
        ("tokens", pa.int64()),
        ("windows", pa.int64()),
        ("label", pa.int32()),
        ("where", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a corpus became.

    Attributes:
        counts: of documents, tokens and windows.
        labels: of documents, in the order in which they came.
        shards: tokens of each shard.
    """

    counts: CorpusCounts
    labels: tuple[str, ...]
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ShardTokens:
    """The tokens of one shard.

    Shapes:
        token_ids: int32 [tokens]
        lengths, documents, labels, ends: int64 [windows]: tokens of a window, its document, that
            one's label or −1, and 1 where the document ends with it
    """

    first_token: int
    token_ids: Tensor
    lengths: Tensor
    documents: Tensor
    labels: Tensor
    ends: Tensor


def cut(
    documents: Iterable[CorpusDocument],
    folder: Path,
    *,
    tokenizer: Any,
    vocab_size: int,
    context: int,
    options: StoreOptions,
    report: ReadingReport,
    strict: bool,
) -> Cut:
    """Write the token ids of every shard, and the index of documents.

    Args:
        documents: read once.
        folder: of the store.
        tokenizer: of the model; None where documents are token ids.
        vocab_size: of the model.
        context: maximum tokens of a window.
        options: of the store.
        report: counts entries that give no tokens.
        strict: raise at the first of them.

    Raises:
        TextError: no document gives a token, or a bad one with `strict`.
        PromptError: as `token_ids_of`, where it is not one document's fault.
        WriteError: the folder cannot be written to.

    Memory: one shard's token ids.
    """
    shards = _Shards(folder, options.shard_tokens)
    labels: dict[str, int] = {}
    n_read = n_documents = n_tokens = n_windows = n_windowed = longest = 0
    with atomic(folder / DOCUMENTS_NAME) as file, pq.ParquetWriter(file, _SCHEMA) as index:
        rows: list[dict[str, Any]] = []
        for document in documents:
            n_read += 1
            try:
                ids = _ids(document, tokenizer, vocab_size, options)
            except (NoTokenizerError, NoChatTemplateError):
                raise  # not this document's fault
            except (PromptError, TextError) as error:
                report.refuse(TextError(f"{document.where}: {error}"), strict=strict)
                continue
            if options.max_tokens is not None:
                ids = ids[: options.max_tokens - n_tokens]
            label = -1
            if document.label is not None:
                label = labels.setdefault(document.label, len(labels))
            windows = [ids[at : at + context] for at in range(0, len(ids), context)]
            for number, window in enumerate(windows):
                shards.add(window, n_documents, label, ends=number == len(windows) - 1)
            rows.append(
                {
                    "document": n_documents, "first_token": n_tokens, "tokens": len(ids),
                    "windows": len(windows), "label": label, "where": document.where,
                }
            )  # fmt: skip
            n_documents += 1
            n_tokens += len(ids)
            n_windows += len(windows)
            longest = max(longest, *map(len, windows), 0)
            n_windowed += len(windows) > 1
            if len(rows) == _ROWS:
                index.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                rows = []
            if n_tokens == options.max_tokens:
                break
        if rows:
            index.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    shards.flush()
    if not n_documents:
        first = f"; the first: {report.examples[0]}" if report.examples else ""
        raise TextError(f"no document gives a token: {report.bad} could not be read{first}")
    counts = CorpusCounts(
        read=n_read,
        documents=n_documents,
        tokens=n_tokens,
        windows=n_windows,
        longest=longest,
        windowed=n_windowed,
        empty=report.empty,
        bad=report.bad,
        examples=tuple(report.examples),
    )
    return Cut(counts, tuple(labels), tuple(shards.sizes))


def _ids(
    document: CorpusDocument, tokenizer: Any, vocab_size: int, options: StoreOptions
) -> list[int]:
    content = document.content
    if is_messages(content):  # a chat of a corpus is whole: no answer begins behind it
        content = ids_of_messages(content, tokenizer, answer=False)
    return token_ids_of(
        content,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        add_special_tokens=options.add_special_tokens,
    )


@dataclass(slots=True)
class _Shards:
    folder: Path
    size: int
    sizes: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    windows: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, window: list[int], document: int, label: int, *, ends: bool) -> None:
        """Add a window; what no longer fits begins a new shard."""
        if self.ids and len(self.ids) + len(window) > self.size:
            self.flush()
        self.ids += window
        self.windows.append((len(window), document, label, int(ends)))

    def flush(self) -> None:
        """Write the shard so far."""
        if not self.ids:
            return
        lengths, documents, labels, ends = torch.tensor(self.windows).T
        tensors = {
            "token_ids": torch.tensor(self.ids, dtype=torch.int32),
            "lengths": lengths.contiguous(),
            "documents": documents.contiguous(),
            "labels": labels.contiguous(),
            "ends": ends.contiguous(),
        }
        place = self.folder / tokens_name(len(self.sizes))
        first = {"first_token": sum(self.sizes)}
        write_tensors(place, tensors, {"format": TOKENS_FORMAT, "version": TOKENS_VERSION, **first})
        self.sizes.append(len(self.ids))
        self.ids, self.windows = [], []


def read_tokens(folder: Path, shard: int) -> ShardTokens:
    """The tokens of one shard.

    Raises:
        ModelNotFoundError, CorruptFileError: there are none, or they are damaged.
    """
    tensors, manifest = read_tensors(folder / tokens_name(shard), TOKENS_FORMAT, TOKENS_VERSION)
    return ShardTokens(int(manifest["first_token"]), **tensors)
