"""The values of one site in a store, read where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.caches.indices import check_index
from trilens.corpus.batch import TokenBatch
from trilens.corpus.index import StoreIndex
from trilens.corpus.manifest import StoredSite
from trilens.corpus.rows import value_dtype
from trilens.errors import OutOfRangeError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa


__all__ = ["StoredValues"]

Loader = Callable[..., Iterator[TokenBatch]]


class StoredValues:
    """Values of a site and layer, one row a token, without loading them.

    `values[7]` is one token's, `values[10:20]` and `values[[4, 2]]` are some tokens', by their
    numbers in the store; `values.document(3)` is one document's. Rows that stand together in one
    shard are views of the mapped file; what is written into them does not reach it.

    Attributes:
        site: name of the site.
        layer: None for a site that the model has once.
        axes: named axes, "token" first.
        shape: (tokens, …).
        dtype: of what is given: float32 where int8 is stored.
    """

    def __init__(self, index: StoreIndex, stored: StoredSite, batches: Loader) -> None:
        self._index, self._stored, self._batches = index, stored, batches
        self.site, self.layer, self.axes = stored.site, stored.layer, stored.axes
        self.shape = (index.n_tokens, *stored.shape)
        self.dtype = value_dtype(stored)

    @property
    def relative_error(self) -> float | None:
        """‖x − x̂‖² / ‖x‖² of int8 over all tokens; None of other dtypes."""
        return self._stored.relative_error

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        where = self.site if self.layer is None else f"{self.site} of layer {self.layer}"
        stored = self._stored.dtype
        return f"StoredValues({where}: {list(self.shape)} {'/'.join(self.axes)}, {stored})"

    def __getitem__(self, index: SupportsIndex | slice | Sequence[int] | Tensor) -> Tensor:
        """Values of tokens: [… of one] of a number, else [n, …].

        Raises:
            OutOfRangeError: a token that the store does not have.
            UsageError: no token number, slice of step 1 or list of numbers.
        """
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                raise UsageError(f"step {step} of a slice is not read: give a list of tokens")
            return self.range(begin, end)
        if isinstance(index, Tensor | np.ndarray | list | tuple | range):
            return self._rows([int(each) for each in index])
        number = self._token(index)  # type: ignore[arg-type]
        return self.range(number, number + 1)[0]

    def range(self, begin: int, end: int) -> Tensor:
        """Values of the tokens from `begin` to before `end`: [tokens, …]."""
        files = self._index.files
        parts = [files.mapped(self._stored, p) for p in files.pieces(begin, max(begin, end))]
        if len(parts) == 1:
            return parts[0]
        empty = torch.empty((0, *self._stored.shape), dtype=self.dtype, device="cpu")
        return torch.cat(parts) if parts else empty

    def _rows(self, numbers: list[int]) -> Tensor:
        found = torch.empty((len(numbers), *self._stored.shape), dtype=self.dtype, device="cpu")
        for row, number in enumerate(numbers):
            at = self._token(number)
            found[row] = self.range(at, at + 1)[0]
        return found

    def _token(self, number: SupportsIndex) -> int:
        return check_index(number, len(self), "token", "this store", negative=True)

    def document(self, number: SupportsIndex) -> Tensor:
        """Values of one document's tokens: [seq, …].

        Raises:
            OutOfRangeError: the store has no such document.
        """
        begin, end = self._index.token_range(number)
        return self.range(begin, end)

    def documents(self) -> Iterator[Tensor]:
        """Values of every document, one after another: [seq, …] each."""
        return (self.document(number) for number in range(self._index.n_documents))

    def to_torch(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Values of a range of tokens in memory of their own: [tokens, …].

        Memory: all that is asked for, by default the whole site.
        """
        begin, end = self._bounds(begin, end)
        return self.range(begin, end).clone()

    def to_numpy(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As `to_torch`; float32 where bfloat16 is stored, which NumPy lacks."""
        found = self.to_torch(begin, end)
        return (found.float() if found.dtype == torch.bfloat16 else found).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        found = self.to_numpy()
        return found if dtype is None else found.astype(dtype)

    def to_arrow(self, begin: int = 0, end: int | None = None) -> pa.Table:
        """A range of tokens as an Arrow table: document, position, token_id, and values as a list
        of one length, flattened in row-major order.
        """
        import pyarrow as pa

        begin, end = self._bounds(begin, end)
        values = self.to_numpy(begin, end).reshape(-1)
        documents, positions = self._index.locate(torch.arange(begin, end))
        width = int(np.prod(self._stored.shape))
        return pa.table(
            {
                "document": documents.numpy(),
                "position": positions.numpy(),
                "token_id": self._index.token_ids_of(begin, end).numpy(),
                "values": pa.FixedSizeListArray.from_arrays(pa.array(values), width),
            }
        )

    def iter_batches(
        self,
        batch_tokens: SupportsIndex = 4096,
        *,
        shuffle: SupportsIndex | None = None,
        start: SupportsIndex = 0,
        buffer_tokens: SupportsIndex = 1 << 16,
    ) -> Iterator[TokenBatch]:
        """Batches of one epoch, each token once; as `Store.iter_batches` of this site alone."""
        return self._batches(
            batch_tokens,
            sites=[(self.site, self.layer)],
            shuffle=shuffle,
            start=start,
            buffer_tokens=buffer_tokens,
        )

    def _bounds(self, begin: int, end: int | None) -> tuple[int, int]:
        last = len(self) if end is None else end
        if not 0 <= begin <= last <= len(self):
            raise OutOfRangeError(
                f"tokens {begin}–{last} are out of range: this store has {len(self)}"
            )
        return begin, last
