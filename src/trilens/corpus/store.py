"""A store, opened: without the model, without the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, SupportsIndex

import pyarrow as pa

from trilens.axes import site_name
from trilens.caches.storage import spell_layers
from trilens.corpus.batch import TokenBatch, token_batches
from trilens.corpus.finishing import stored_files
from trilens.corpus.index import StoreIndex, read_table
from trilens.corpus.manifest import StoredSite, read_manifest
from trilens.corpus.names import DOCUMENTS_NAME, METRICS_NAME, REDUCED_NAME
from trilens.corpus.reducing import read_reduced
from trilens.corpus.results import Reduced
from trilens.corpus.values import StoredValues
from trilens.errors import CorruptFileError, NotStoredError, UsageError
from trilens.io.messages import listed
from trilens.io.paths import as_path
from trilens.results import Tabular

__all__ = ["Store", "open_store"]


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store that `capture_corpus` or `trilens capture --data` wrote.

    The manifest is read and checked, and that every file has its size; values are read when they
    are asked for. `validate_store` reads every byte.

    Raises:
        ModelNotFoundError: there is no store.
        CorruptFileError: it is unfinished, damaged, or of a newer version.
    """
    folder = as_path(path, "store")
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise CorruptFileError(
            f"{folder} is unfinished: run the same capture again, which goes on from there"
        )
    for name in stored_files(manifest):
        file, claim = folder / name, manifest.files.get(name)
        size = file.stat().st_size if file.is_file() else None
        if claim is None or size != claim.get("size_bytes"):
            raise CorruptFileError(
                f"{file} is {'missing' if size is None else 'of another size'}: run the same "
                "capture again, which writes what is damaged anew"
            )
    return Store(folder, manifest)


class Store(StoreIndex, Tabular):
    """Activations of a corpus on disk. `open_store` opens one.

    `store["resid_post", 8]` are the values of a site and layer, `store["embed"]` of a site that
    the model has once. Tokens are numbered through all documents, in their order.

    Attributes:
        folder: where it is.
        manifest: what it says of itself: options, counts, fingerprints, checksums.
    """

    @property
    def sites(self) -> tuple[tuple[str, int | None], ...]:
        """Site and layer of everything that is stored."""
        stored = self.manifest.sites if self.manifest.options.values else ()
        return tuple(site.key for site in stored)

    @property
    def padding(self) -> float:
        """Share of the forward passes' tokens that was padding, in [0, 1)."""
        return 1.0 - self.n_tokens / (self.manifest.padded or self.n_tokens)

    def table(self) -> list[dict[str, Any]]:
        """One row per site and layer: site, layer, axes, shape, dtype, relative_error."""
        return [
            {
                "site": each.site,
                "layer": each.layer,
                "axes": list(each.axes),
                "shape": [self.n_tokens, *each.shape],
                "dtype": each.dtype,
                "relative_error": each.relative_error,
            }
            for each in (self.manifest.sites if self.manifest.options.values else ())
        ]

    def to_dict(self) -> dict[str, Any]:
        """The manifest without its list of files, and the size, as JSON can hold them."""
        plain = self.manifest.to_dict()
        del plain["files"]
        return {**plain, "shards": len(self.manifest.shards), "size_bytes": self.nbytes}

    @property
    def nbytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(claim["size_bytes"] for claim in self.manifest.files.values())

    def __repr__(self) -> str:
        return (
            f"Store({self.n_documents} documents, {self.n_tokens} tokens of "
            f"{self.manifest.model.model_class}: {listed(map(_spelled, self.sites), 6)}; "
            f"{self.nbytes / 1e6:.1f} MB)"
        )

    def __getitem__(self, key: str | tuple[str, SupportsIndex | None]) -> StoredValues:
        """The values of a site, lazily.

        Raises:
            UnknownSiteError: no site has this name.
            NotStoredError: it is not stored, or not of this layer.
        """
        return StoredValues(self, self._stored(key), self.iter_batches)

    def __contains__(self, key: object) -> bool:
        try:
            self._stored(key)
        except NotStoredError:
            return False
        return True

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def _stored(self, key: object) -> StoredSite:
        text, layer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        name, own = site_name(text)
        number = own if layer is None else int(layer)
        if not self.manifest.options.values:
            raise NotStoredError(
                "this store holds reducers alone: ask store.reduced, or capture with values=True"
            )
        for site in self.manifest.sites:
            if site.key == (name, number):
                return site
        layers = [site.layer for site in self.manifest.sites if site.site == name]
        held = (
            f"it holds the site for {spell_layers([n for n in layers if n is not None])}"
            if layers
            else f"it holds {listed(map(_spelled, self.sites), 6)}"
        )
        raise NotStoredError(f"{_spelled((name, number))} is not in this store: {held}")

    def iter_batches(
        self,
        batch_tokens: SupportsIndex = 4096,
        *,
        sites: Iterable[tuple[str, int | None]] | None = None,
        shuffle: SupportsIndex | None = None,
        start: SupportsIndex = 0,
        buffer_tokens: SupportsIndex = 1 << 16,
    ) -> Iterator[TokenBatch]:
        """Batches of one epoch: every token once.

        Args:
            batch_tokens: tokens of a batch; the last one is smaller.
            sites: which values, of the same tokens; all where not given.
            shuffle: seed of a random order; None for the order of the corpus. Blocks of 256
                neighbouring tokens come in random order and are mixed in a buffer.
            start: tokens to leave out: `TokenBatch.position` of the batch to go on behind, with
                the same seed, `batch_tokens` and `buffer_tokens`.
            buffer_tokens: tokens that are mixed at a time.

        Raises:
            NotStoredError: a site that is not stored.
            ValueRangeError: a number below 1, or a seed below 0.
            OutOfRangeError: a start beyond the store.

        Memory: the buffer's values twice, and 12 bytes for each 256 tokens of the store.
        """
        chosen = [self._stored(key) for key in (self.sites if sites is None else sites)]
        if not chosen:
            raise UsageError("no site was named: give at least one of store.sites")
        return token_batches(
            self.files,
            chosen,
            batch_tokens,
            shuffle=shuffle,
            start=start,
            buffer_tokens=buffer_tokens,
        )

    @cached_property
    def reduced(self) -> Reduced:
        """What the reducers found, by kind, site and layer.

        Raises:
            NotStoredError: the store was captured without reducers.
        """
        if not self.manifest.options.reduce:
            raise NotStoredError("this store has no reducers: capture with reduce=['mean', …]")
        reducers, _ = read_reduced(self.folder / REDUCED_NAME)
        return Reduced(reducers, self.manifest.labels)

    def metrics(self) -> pa.Table:
        """Numbers of gates and heads, and errors of int8, as an Arrow table: model, layer, module,
        head, metric, value.
        """
        return read_table(self.folder / METRICS_NAME)

    def documents(self) -> pa.Table:
        """The index of documents as an Arrow table: document, first_token, tokens, windows, label
        (its number in `manifest.labels`, −1 for none), where.
        """
        return read_table(self.folder / DOCUMENTS_NAME)


def _spelled(key: tuple[str, int | None]) -> str:
    name, layer = key
    return name if layer is None else f"{name} of layer {layer}"
