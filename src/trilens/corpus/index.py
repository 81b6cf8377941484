"""Where documents and tokens stand in a store."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.caches.indices import check_index
from trilens.corpus.manifest import StoreManifest
from trilens.corpus.names import DOCUMENTS_NAME
from trilens.corpus.rows import RowFiles
from trilens.errors import CorruptFileError, OutOfRangeError
from trilens.io.guarded import open_regular
from trilens.io.messages import reason

__all__ = ["StoreIndex", "read_table"]

_INDEX = ("first_token", "tokens", "label")


class StoreIndex:
    """Documents and tokens of a store, and the files of its shards.

    Args:
        folder: of the store.
        manifest: of the store.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.files = RowFiles(folder, manifest)

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return self.manifest.counts.tokens

    @property
    def n_documents(self) -> int:
        """Documents."""
        return self.manifest.counts.documents

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """Tokens of each document: int64 [documents]."""
        found: NDArray[np.int64] = self._columns["tokens"].astype(np.int64)
        return found

    def token_range(self, document: SupportsIndex) -> tuple[int, int]:
        """The first token of a document, and the one behind its last.

        Raises:
            OutOfRangeError: the store has no such document.
        """
        at = check_index(document, self.n_documents, "document", "this store", negative=True)
        first = int(self._columns["first_token"][at])
        return first, first + int(self._columns["tokens"][at])

    def token_ids(self, document: SupportsIndex) -> Tensor:
        """Token ids of a document: int32 [seq]; `OutOfRangeError` where there is none."""
        return self.token_ids_of(*self.token_range(document))

    def token_ids_of(self, begin: int, end: int) -> Tensor:
        """Token ids of a range of tokens: int32 [tokens]."""
        if not 0 <= begin <= end <= self.n_tokens:
            raise OutOfRangeError(
                f"tokens {begin}–{end} are out of range: this store has {self.n_tokens}"
            )
        parts = [self.files.token_ids(piece) for piece in self.files.pieces(begin, end)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Document and position in it of tokens by their numbers: int64, of the shape given.

        Raises:
            OutOfRangeError: a token that the store does not have.
        """
        numbers = torch.as_tensor(tokens).cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.n_tokens:
            raise OutOfRangeError(
                f"tokens {numbers.min()}–{numbers.max()} are out of range: this store has "
                f"{self.n_tokens}"
            )
        firsts = self._columns["first_token"]
        documents = np.searchsorted(firsts, numbers, side="right") - 1
        return torch.from_numpy(documents), torch.from_numpy(numbers - firsts[documents])

    def label(self, document: SupportsIndex) -> str | None:
        """The label of a document; None where it has none."""
        at = check_index(document, self.n_documents, "document", "this store", negative=True)
        number = int(self._columns["label"][at])
        return None if number < 0 else self.manifest.labels[number]

    @cached_property
    def _columns(self) -> dict[str, Any]:
        table = read_table(self.folder / DOCUMENTS_NAME, _INDEX)
        found = {name: table.column(name).to_numpy() for name in _INDEX}
        ends = np.cumsum(found["tokens"])
        whole = len(ends) == self.n_documents and len(ends) and ends[-1] == self.n_tokens
        if not whole or (found["first_token"] != ends - found["tokens"]).any():
            raise CorruptFileError(
                f"{self.folder / DOCUMENTS_NAME} does not fit the manifest: capture again with "
                "overwrite"
            )
        return found


def read_table(path: Path, columns: tuple[str, ...] | None = None) -> pa.Table:
    """A Parquet file of a store; `CorruptFileError` where it cannot be read."""
    try:
        with open_regular(path) as file:
            return pq.read_table(file, columns=list(columns) if columns else None)
    except (pa.ArrowException, OSError, ValueError) as cause:
        raise CorruptFileError(f"{path} is not a readable Parquet file: {reason(cause)}") from cause
