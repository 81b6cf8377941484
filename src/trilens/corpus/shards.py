"""The shard function: from the token ids of one shard to its file of values, on one worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.corpus.coding import SCALE, CodingError, stored_dtype, written_values
from trilens.corpus.cutting import ShardTokens, read_tokens
from trilens.corpus.manifest import StoreManifest
from trilens.corpus.names import reduced_name, shard_name
from trilens.corpus.options import StoreOptions
from trilens.corpus.reducing import ReducerSet
from trilens.errors import CaptureError, CorruptFileError
from trilens.io.tensors import read_head, read_tensors, write_tensors
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

__all__ = ["ShardDone", "batches", "capture_shard", "check_shard", "shard_facts", "threads_of"]

SHARD_FORMAT, SHARD_VERSION = "trilens.store_shard", 1
_PADDING = 0.1


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What a worker reports of a shard.

    Attributes:
        shard: its number.
        tokens: that went through the model.
        padded: tokens of its batches, padding included.
    """

    shard: int
    tokens: int
    padded: int


def threads_of(options: StoreOptions) -> None:
    """Let torch use the store's number of threads: sums depend on it."""
    torch.set_num_threads(options.threads)


def batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Windows that go through the model together: by falling length, at most 10 % of it padding.

    Args:
        lengths: of the windows.
        batch_tokens: maximum of a batch, padding included, or one window.

    Yields:
        Places in `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batch: list[int] = []
    real = 0
    for place in order:
        longest = lengths[batch[0]] if batch else lengths[place]
        size = longest * (len(batch) + 1)
        padding = size - real - lengths[place]
        if batch and (size > batch_tokens or padding > _PADDING * size):
            yield batch
            batch, real = [], 0
        batch.append(place)
        real += lengths[place]
    if batch:
        yield batch


def capture_shard(lens: Lens, folder: Path, manifest: StoreManifest, shard: int) -> ShardDone:
    """Run the model over one shard and write its values and reducers.

    Args:
        lens: of the store's model; its torch threads are set.
        folder: of the store.
        manifest: of the store.
        shard: its number.

    Raises:
        WriteError: the file cannot be written.
        CaptureError: a site that has another shape than it had at first.
        TrilensError: as `Lens.capture_many`.

    Memory: the values of the shard in the stored dtype, and one batch.
    """
    options, tokens = manifest.options, read_tokens(folder, shard)
    reducers = ReducerSet(options, len(manifest.labels)) if options.reduce else None
    values = _Values(manifest, len(tokens.token_ids)) if options.values else None
    # The longest windows decide for all whether padding is safe, whichever shard is first.
    if len(tokens.lengths) > 1:
        lens.batches_safely(manifest.counts.longest)
    ends = tokens.lengths.cumsum(0).tolist()
    padded = 0
    for places, captures in _captured(lens, tokens, options):
        longest = 0
        for place, capture in zip(places, captures, strict=True):
            n = int(tokens.lengths[place])
            row = ends[place] - n
            longest = max(longest, n)
            if values is not None:
                values.put(capture, row, n)
            if reducers is not None:
                label, last = int(tokens.labels[place]), bool(tokens.ends[place])
                reducers.feed(capture, tokens.first_token + row, label, ends=last)
        padded += longest * len(places)
    if reducers is not None:
        reducers.write(folder / reduced_name(shard), 1)
    done = ShardDone(shard, len(tokens.token_ids), padded)
    head = {
        "format": SHARD_FORMAT,
        "version": SHARD_VERSION,
        "store": manifest.fingerprint,
        "shard": shard,
    }
    facts = {"tokens": done.tokens, "padded": padded, "errors": values.sums() if values else {}}
    # Last: a shard is done where this file is there.
    tensors = values.tensors if values is not None else {}
    write_tensors(folder / shard_name(shard), tensors, {**head, **facts})
    return done


def _captured(
    lens: Lens, tokens: ShardTokens, options: StoreOptions
) -> Iterator[tuple[list[int], Iterator[Capture]]]:
    ids = torch.split(tokens.token_ids.long(), tokens.lengths.tolist())
    moments = {"mean", "covariance", "class_means", "top_contexts"} & set(options.reduce)
    for places in batches(tokens.lengths.tolist(), options.batch_tokens):
        yield (
            places,
            lens.capture_many(
                [ids[place] for place in places],
                batch_size=len(places),
                residual=None,
                logits=None,
                sites=options.sites if options.values or moments else (),
                layers=options.layers,
                gates="gating" in options.reduce,
                attention="attention" in options.reduce,
            ),
        )


@dataclass(slots=True)
class _Values:
    """The tensors of a shard in the making."""

    manifest: StoreManifest
    n_tokens: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, CodingError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.manifest.sites:
            dtype = stored_dtype(site.dtype, torch.float32)
            self.tensors[site.tensor] = torch.empty(
                (self.n_tokens, *site.shape), dtype=dtype, device="cpu"
            )
            if dtype == torch.int8:
                self.tensors[site.tensor + SCALE] = torch.empty(
                    self.n_tokens, dtype=torch.float32, device="cpu"
                )
                self.errors[site.tensor] = CodingError()

    def put(self, capture: Capture, row: int, n: int) -> None:
        """Store the values of one window."""
        for site in self.manifest.sites:
            found = capture.sites[site.key]
            if tuple(found.shape) != (n, *site.shape):
                raise CaptureError(
                    f"site {site.site} of layer {site.layer} gave {list(found.shape)} for {n} "
                    f"tokens: it was {[n, *site.shape]} at first"
                )
            rows = slice(row, row + n)
            scales = self.tensors.get(site.tensor + SCALE)
            written_values(
                found,
                self.tensors[site.tensor][rows],
                None if scales is None else scales[rows],
                self.errors.get(site.tensor),
            )

    def sums(self) -> dict[str, list[float]]:
        """Per tensor the sums that its relative error is made of."""
        return {name: [each.error, each.total] for name, each in self.errors.items()}


def shard_facts(folder: Path, shard: int) -> tuple[dict[str, Any], str]:
    """What a shard's header says, and the hash that it names; no value is read.

    Raises:
        CorruptFileError: it is missing, cut off, or no shard.
    """
    return read_head(folder / shard_name(shard), SHARD_FORMAT, SHARD_VERSION)


def check_shard(folder: Path, manifest: StoreManifest, shard: int) -> None:
    """Read every byte of a shard.

    Raises:
        ModelNotFoundError: it is missing.
        CorruptFileError: it is damaged, or of another store.
    """
    path = folder / shard_name(shard)
    _, found = read_tensors(path, SHARD_FORMAT, SHARD_VERSION)
    if found.get("store") != manifest.fingerprint or found.get("shard") != shard:
        raise CorruptFileError(f"{path} is a shard of another store, or of another place in it")
