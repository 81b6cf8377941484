"""Batches of tokens out of a store: in order or shuffled, each token once, from any position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.corpus.manifest import StoredSite
from trilens.corpus.rows import Piece, RowFiles, value_dtype
from trilens.errors import OutOfRangeError
from trilens.numbers import at_least, whole_number

__all__ = ["TokenBatch", "token_batches"]

_BLOCK = 256
_READERS = 4

Int = NDArray[np.int64]
_Key = tuple[str, int | None]
_Memory = dict[_Key, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Values of some tokens.

    Attributes:
        by_site: values [n, …] by site and layer.
        tokens: int64 [n], their numbers in the store, which `Store.locate` finds.
        position: tokens given so far: `start=` of a loader that goes on behind this batch.
    """

    by_site: dict[tuple[str, int | None], Tensor]
    tokens: Tensor
    position: int

    @property
    def values(self) -> Tensor:
        """The values of the only site, or the first, [n, …]."""
        return next(iter(self.by_site.values()))

    def __len__(self) -> int:
        return len(self.tokens)


def token_batches(
    files: RowFiles,
    sites: Sequence[StoredSite],
    batch_tokens: SupportsIndex,
    *,
    shuffle: SupportsIndex | None,
    start: SupportsIndex,
    buffer_tokens: SupportsIndex,
) -> Iterator[TokenBatch]:
    """Batches of one epoch.

    Shuffled, blocks of 256 neighbouring tokens come in random order, fill a buffer, and are mixed
    in it; both orders follow from the seed, so that any position is found without what was before.

    Args:
        files: of the store.
        sites: whose values are given.
        batch_tokens: tokens of a batch; the last one is smaller.
        shuffle: a seed; None for the order of the corpus.
        start: tokens to leave out, as `TokenBatch.position` gave it.
        buffer_tokens: tokens that are mixed at a time.

    Raises:
        ValueRangeError: a number below 1, or a seed below 0.
        OutOfRangeError: a start beyond the store.

    Memory: the buffer twice, and 12 bytes for each block of the store.
    """
    size = at_least(1, batch_tokens, "batch_tokens")
    total = files.starts[-1]
    begin = whole_number(start, "start")
    if not 0 <= begin <= total:
        raise OutOfRangeError(f"start {begin} is out of range: this store has {total} tokens")
    seed = None if shuffle is None else at_least(0, shuffle, "shuffle")
    wanted = at_least(1, buffer_tokens, "buffer_tokens")
    buffer = max(1, wanted // size) * size
    order = _Order.of(files, seed)
    return _batches(files, sites, order, size, buffer, begin)


def _batches(
    files: RowFiles,
    sites: Sequence[StoredSite],
    order: _Order,
    size: int,
    buffer: int,
    begin: int,
) -> Iterator[TokenBatch]:
    total = files.starts[-1]
    numbers = range(begin // buffer, -(-total // buffer))
    # Two memories in turn: one is read into while batches are taken from the other.
    memories: tuple[_Memory, _Memory] = ({}, {})

    def load(number: int) -> tuple[Tensor | None, Tensor, dict[_Key, Tensor]]:
        first, last = number * buffer, min(total, (number + 1) * buffer)
        pieces, mixed = order.pieces(first, last), order.mixed(number, last - first)
        # In the order of the corpus batches are views, and need memory of their own.
        memory = {} if mixed is None else memories[number % 2]
        found = {
            site.key: _load(files, site, pieces, last - first, memory, readers) for site in sites
        }
        return mixed, _numbers(files, pieces), found

    # Several reads at once: a disk that is asked for one block at a time waits between them.
    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, numbers.start) if numbers else None
        for number in numbers:
            assert ahead is not None
            mixed, tokens, loaded = ahead.result()
            if number + 1 in numbers:
                ahead = reader.submit(load, number + 1)
            first, last = number * buffer, min(total, (number + 1) * buffer)
            for at in range(max(first, begin), last, size):
                rows = slice(at - first, min(at + size, last) - first)
                yield TokenBatch(
                    {key: _chosen(values, mixed, rows) for key, values in loaded.items()},
                    _chosen(tokens, mixed, rows),
                    min(at + size, last),
                )


def _chosen(values: Tensor, mixed: Tensor | None, rows: slice) -> Tensor:
    return values[rows] if mixed is None else values.index_select(0, mixed[rows])


def _load(
    files: RowFiles,
    site: StoredSite,
    pieces: list[Piece],
    n: int,
    memory: _Memory,
    readers: ThreadPoolExecutor,
) -> Tensor:
    values = memory.get(site.key)
    if values is None or len(values) < n:
        values = torch.empty((n, *site.shape), dtype=value_dtype(site), device="cpu")
        memory[site.key] = values
    ends = list(accumulate(piece.end - piece.begin for piece in pieces))
    parts = [values[end - (p.end - p.begin) : end] for p, end in zip(pieces, ends, strict=True)]
    for _ in readers.map(partial(files.read, site), pieces, parts):
        pass  # what a read raised is raised here
    return values[:n]


def _numbers(files: RowFiles, pieces: list[Piece]) -> Tensor:
    return torch.cat(
        [
            torch.arange(files.starts[p.shard] + p.begin, files.starts[p.shard] + p.end)
            for p in pieces
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """The order of blocks: `blocks` numbers them, `ends` are the tokens up to each one's end."""

    files: RowFiles
    seed: int | None
    blocks: NDArray[np.uint32]
    ends: Int
    firsts: Int

    @classmethod
    def of(cls, files: RowFiles, seed: int | None) -> _Order:
        sizes = np.diff(np.asarray(files.starts, np.int64))
        counts = -(-sizes // _BLOCK)
        firsts = np.concatenate([[0], np.cumsum(counts)])
        n = int(firsts[-1])
        blocks = np.arange(n, dtype=np.uint32)
        if seed is not None:
            np.random.default_rng((seed, 0)).shuffle(blocks)
        lengths = np.full(n, _BLOCK, np.int64)
        lengths[firsts[1:] - 1] = sizes - (counts - 1) * _BLOCK
        return cls(files, seed, blocks, np.cumsum(lengths[blocks]), firsts)

    def pieces(self, begin: int, end: int) -> list[Piece]:
        """What stands from `begin` to before `end` of the order, as pieces of shards."""
        found: list[Piece] = []
        place = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            block = int(self.blocks[place])
            shard = int(np.searchsorted(self.firsts, block, side="right")) - 1
            row = (block - int(self.firsts[shard])) * _BLOCK
            block_begin = int(self.ends[place - 1]) if place else 0
            last = min(end, int(self.ends[place]))
            piece = Piece(shard, row + begin - block_begin, row + last - block_begin)
            if found and (found[-1].shard, found[-1].end) == (shard, piece.begin):
                found[-1] = Piece(shard, found[-1].begin, piece.end)
            else:
                found.append(piece)
            begin, place = last, place + 1
        # In the order of the files: what is read forward is read faster, and is mixed anyway.
        return found if self.seed is None else sorted(found, key=lambda p: (p.shard, p.begin))

    def mixed(self, number: int, n: int) -> Tensor | None:
        """The order of the n tokens of a buffer; None to leave it."""
        if self.seed is None:
            return None
        generator = np.random.default_rng((self.seed, 1, number))
        return torch.from_numpy(generator.permutation(n))
