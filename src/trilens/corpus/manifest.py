"""The manifest of a store: what is in it, of which model and text, and how far it got."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from trilens.corpus.names import MANIFEST_NAME
from trilens.corpus.options import StoreOptions
from trilens.errors import CorruptFileError, ModelNotFoundError, TrilensError
from trilens.io.atomic import write_bytes
from trilens.io.json import json_bytes
from trilens.io.messages import other_version
from trilens.io.sealed import read_sealed, sealed
from trilens.io.typed import typed
from trilens.lens.parts import ModelInfo

__all__ = ["FORMAT", "VERSION", "CorpusCounts", "StoreManifest", "StoredSite", "read_manifest"]

FORMAT = "trilens.store"
VERSION = 1


@dataclass(frozen=True, slots=True)
class CorpusCounts:
    """What the text of a store was.

    Attributes:
        read: documents that were read of the corpus, empty ones not counted.
        documents: of them those that gave tokens.
        tokens: of all documents.
        windows: forward passes' rows: a document longer than the context has several.
        longest: tokens of the longest window.
        windowed: documents that were cut into several windows.
        empty: entries without text, left out.
        bad: entries that could not be read, left out.
        examples: what was wrong with the first of them.
    """

    read: int
    documents: int
    tokens: int
    windows: int
    longest: int
    windowed: int
    empty: int
    bad: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredSite:
    """The values of one site of one layer.

    Attributes:
        site: a name of `axes.SITES`.
        layer: None for a site that the model has once.
        axes: named axes: "token" first, then those of one token.
        shape: of one token.
        dtype: as it is stored.
        relative_error: of int8: ‖x − x̂‖² / ‖x‖² over all tokens, once the store is complete; None
            for other dtypes.
    """

    site: str
    layer: int | None
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    relative_error: float | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        """Name and layer."""
        return self.site, self.layer

    @property
    def tensor(self) -> str:
        """Its name in a shard."""
        return self.site if self.layer is None else f"{self.site}.{self.layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreManifest:
    """Everything that a store says of itself.

    Attributes:
        code: version of trilens that wrote it.
        model: which model it was.
        model_fingerprint: of its configuration and weights.
        tokenizer_fingerprint: "" where documents were token ids.
        corpus_fingerprint: of every document, in order.
        options: what was asked.
        counts: what the text was.
        sites: whose values are stored, or reduced.
        labels: of documents, for class means.
        shards: tokens of each shard.
        complete: whether every shard is there.
        padded: tokens of all forward passes, padding included, when it is complete.
        files: size and hash of every file but this one, when it is complete.
    """

    code: str
    model: ModelInfo
    model_fingerprint: str
    tokenizer_fingerprint: str
    corpus_fingerprint: str
    options: StoreOptions
    counts: CorpusCounts
    sites: tuple[StoredSite, ...]
    labels: tuple[str, ...] = ()
    shards: tuple[int, ...] = ()
    complete: bool = False
    padded: int | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the bytes of its shards."""
        parts = {**self.identity(), "shards": self.shards}
        return hashlib.sha256(json_bytes(parts)).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What another run must agree in, to go on with this store."""
        return {
            "schema": VERSION,
            "trilens": self.code,
            "model": self.model_fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "corpus": self.corpus_fingerprint,
            "options": self.options.to_dict(),
        }

    def write(self, folder: Path) -> None:
        """Write it; `WriteError` where that fails."""
        write_bytes(folder / MANIFEST_NAME, sealed(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        return {"format": FORMAT, "version": VERSION, **plain, "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, TrilensError: it is something else.
        """
        rest = {k: v for k, v in plain.items() if k not in {"format", "version", "fingerprint"}}
        counts = {**rest["counts"], "examples": tuple(rest["counts"]["examples"])}
        sites = [
            StoredSite(**{**each, "axes": tuple(each["axes"]), "shape": tuple(each["shape"])})
            for each in rest["sites"]
        ]
        return cls(
            **{
                **rest,
                "model": typed(ModelInfo, rest["model"]),
                "options": StoreOptions.from_dict(rest["options"]),
                "counts": CorpusCounts(**counts),
                "sites": tuple(sites),
                "labels": tuple(rest["labels"]),
                "shards": tuple(int(n) for n in rest["shards"]),
            }
        )

    def completed(
        self, files: dict[str, dict[str, Any]], errors: dict[str, float], padded: int
    ) -> Self:
        """The manifest of the whole store."""
        sites = tuple(replace(each, relative_error=errors.get(each.tensor)) for each in self.sites)
        return replace(self, complete=True, padded=padded, files=files, sites=sites)


def read_manifest(folder: Path) -> StoreManifest:
    """Read the manifest of a store.

    Raises:
        ModelNotFoundError: there is none.
        CorruptFileError: damaged, no store's, or of a newer version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ModelNotFoundError(
            f"{folder} is no store: it has no {MANIFEST_NAME}; trilens capture --data writes one"
        )
    found, _ = read_sealed(path)
    if found.get("format") != FORMAT:
        raise CorruptFileError(f"{path} is not the manifest of a {FORMAT}")
    version = found.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CorruptFileError(other_version(f"{path} is {FORMAT}", version, VERSION, oldest=1))
    try:
        manifest = StoreManifest.from_dict(found)
    except (KeyError, TypeError, ValueError, AttributeError, TrilensError) as cause:
        raise CorruptFileError(f"{path} is not a whole manifest: {cause}") from cause
    if manifest.fingerprint != found.get("fingerprint"):
        raise CorruptFileError(f"{path} is damaged: its fingerprint is another")
    return manifest
