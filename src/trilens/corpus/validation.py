"""Every byte of a store, checked."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from trilens.corpus.cutting import read_tokens
from trilens.corpus.finishing import claim_of, stored_files
from trilens.corpus.names import MANIFEST_NAME, REDUCED_NAME
from trilens.corpus.reducing import read_reduced
from trilens.corpus.shards import check_shard
from trilens.corpus.store import open_store
from trilens.errors import CorruptFileError
from trilens.io.listing import extra_files
from trilens.results import Tabular

__all__ = ["StoreCheck", "validate_store"]


@dataclass(frozen=True, slots=True)
class StoreCheck(Tabular):
    """A store that is undamaged.

    Attributes:
        files: that were read.
        shards: of them.
        documents: of the corpus.
        tokens: of the corpus.
        size_bytes: of all files.
        extra_files: files in the folder that the manifest does not list; they were not read.
    """

    files: int
    shards: int
    documents: int
    tokens: int
    size_bytes: int
    extra_files: tuple[str, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row."""
        return [self.to_dict()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def validate_store(path: str | os.PathLike[str]) -> StoreCheck:
    """Read every byte of a store and compare it with the hashes of its manifest.

    Raises:
        ModelNotFoundError: there is no store.
        CorruptFileError: unfinished, or damaged; names the file.
    """
    store = open_store(path)
    manifest, folder = store.manifest, store.folder
    for name in stored_files(manifest):
        if claim_of(folder / name) != manifest.files[name]:
            raise CorruptFileError(
                f"{folder / name} is damaged: its hash is not the manifest's; run the same "
                "capture again, which writes shards that are damaged anew"
            )
    for shard, n_tokens in enumerate(manifest.shards):
        check_shard(folder, manifest, shard)
        if len(read_tokens(folder, shard).token_ids) != n_tokens:
            raise CorruptFileError(f"shard {shard} of {folder} has another number of tokens")
    if manifest.options.reduce:
        read_reduced(folder / REDUCED_NAME)
    return StoreCheck(
        files=len(manifest.files) + 1,
        shards=len(manifest.shards),
        documents=store.n_documents,
        tokens=store.n_tokens,
        size_bytes=store.nbytes,
        extra_files=extra_files(folder, [*manifest.files, MANIFEST_NAME]),
    )
