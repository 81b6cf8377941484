"""The reducers of a shard: fed with captures, written, merged in the order of the shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.corpus.names import REDUCED_NAME, reduced_name
from trilens.corpus.options import StoreOptions
from trilens.corpus.reducers import (
    ClassSums,
    ContextReducer,
    GatingReducer,
    HeadSums,
    MomentReducer,
    Reducer,
    Rows,
)
from trilens.corpus.results import ReducedKey
from trilens.errors import CorruptFileError, UsageError
from trilens.io.tensors import read_tensors, write_tensors
from trilens.lens.capture import Capture

__all__ = ["REDUCED_FORMAT", "REDUCED_VERSION", "ReducerSet", "merge_shards", "read_reduced"]

_Source = tuple[str, str, int | None]  # "site", "gating" or "attention"; its name; layer

REDUCED_FORMAT, REDUCED_VERSION = "trilens.store_reduced", 1
_FLUSH_ROWS = 1024
_OF_SITES = ("mean", "covariance", "class_means", "top_contexts")
_CLASSES: dict[str, type[Any]] = {
    "mean": MomentReducer,
    "covariance": MomentReducer,
    "class_means": ClassSums,
    "top_contexts": ContextReducer,
    "gating": GatingReducer,
    "attention": HeadSums,
}


class ReducerSet:
    """All reducers of some shards.

    Args:
        options: which.
        n_labels: of the corpus.
    """

    def __init__(self, options: StoreOptions, n_labels: int) -> None:
        self._options, self._n_labels = options, n_labels
        self.reducers: dict[ReducedKey, Reducer] = {}
        self._waiting: dict[_Source, list[Tensor]] = {}
        self._about: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_waiting = 0

    def feed(self, capture: Capture, first_token: int, label: int, *, ends: bool) -> None:
        """Take in the capture of one window.

        Args:
            capture: with what the options ask.
            first_token: number of its first token in the store.
            label: of its document; −1 for none.
            ends: whether its document ends with it.
        """
        n = len(capture.token_ids)
        last = torch.zeros(n, dtype=torch.bool)
        last[-1] = ends
        tokens = torch.arange(first_token, first_token + n)
        self._about.append((tokens, torch.full((n,), label), last))
        for source, values in self._values(capture, n):
            self._waiting.setdefault(source, []).append(values)
        self._n_waiting += n
        if self._n_waiting >= _FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits; many rows at once make one matrix product."""
        if not self._n_waiting:
            return
        about = [torch.cat(parts) for parts in zip(*self._about, strict=True)]
        for (group, name, layer), parts in self._waiting.items():
            rows = Rows(torch.cat(parts), *about)
            for kind in _OF_SITES if group == "site" else (group,):
                if kind not in self._options.reduce:
                    continue
                key = (kind, name, layer)
                if key not in self.reducers:
                    self.reducers[key] = self._new(kind, rows.values.shape[1])
                self.reducers[key].update(rows)
        self._waiting, self._about, self._n_waiting = {}, [], 0

    def _new(self, kind: str, units: int) -> Reducer:
        if kind == "class_means":
            return ClassSums(units, self._n_labels)
        if kind == "top_contexts":
            return ContextReducer(units, self._options.top_k)
        if kind == "gating":
            return GatingReducer(units, self._options.gate_threshold)
        if kind == "attention":
            return HeadSums(units)
        return MomentReducer(units, pairs=kind == "covariance")

    def _values(self, capture: Capture, n: int) -> Iterator[tuple[_Source, Tensor]]:
        chosen = self._options.reduce
        if set(_OF_SITES) & set(chosen):
            for key in capture.sites:
                yield ("site", *key), capture.sites[key].reshape(n, -1)
        if "gating" in chosen:
            yield from _gates(capture, n)
        if "attention" in chosen:
            yield from _heads(capture, n)

    def write(self, path: Path, shards: int) -> None:
        """Write all states; `WriteError` where that fails."""
        self.flush()
        keys = sorted(self.reducers, key=lambda key: (key[0], key[1], key[2] or 0))
        tensors = {
            f"{number}.{part}": tensor
            for number, key in enumerate(keys)
            for part, tensor in self.reducers[key].state().items()
        }
        head = {"format": REDUCED_FORMAT, "version": REDUCED_VERSION, "shards": shards}
        write_tensors(path, tensors, {**head, "reducers": [list(key) for key in keys]})

    def absorb(self, later: dict[ReducedKey, Reducer]) -> None:
        """Take in the reducers of a later shard."""
        for key, reducer in later.items():
            if key in self.reducers:
                self.reducers[key].absorb(reducer)
            else:
                self.reducers[key] = reducer


def _gates(capture: Capture, n: int) -> Iterator[tuple[_Source, Tensor]]:
    for name, layer in capture.gates:
        try:
            openness = capture.gates.openness(name, layer)
        except UsageError:
            continue  # a function without an openness
        if len(openness) == n:  # else a parameter, the same for every token
            yield ("gating", name, layer), openness


def _heads(capture: Capture, n: int) -> Iterator[tuple[_Source, Tensor]]:
    for layer in capture.attention:
        pattern = capture.attention
        first = torch.from_numpy(pattern.received(layer)[:, :1])
        statistics = [
            torch.from_numpy(pattern.entropy(layer)),
            torch.from_numpy(pattern.mean_distance(layer)),
            torch.from_numpy(pattern.sink_mass(layer)),
            first.expand(-1, n),
        ]
        yield ("attention", "attn.pattern", layer), torch.cat(statistics).T.contiguous()


def read_reduced(path: Path) -> tuple[dict[ReducedKey, Reducer], int]:
    """The reducers of a file, and how many shards they have seen.

    Raises:
        ModelNotFoundError, CorruptFileError: there is none, or it is damaged.
    """
    tensors, manifest = read_tensors(path, REDUCED_FORMAT, REDUCED_VERSION)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.partition(".")
        states.setdefault(number, {})[part] = tensor
    try:
        found = {
            (str(kind), str(name), layer): _CLASSES[kind].rebuilt(states[str(number)])
            for number, (kind, name, layer) in enumerate(manifest["reducers"])
        }
        return found, int(manifest["shards"])
    except (KeyError, TypeError, ValueError, UsageError) as cause:
        raise CorruptFileError(f"{path} holds no whole reducers: {cause}") from cause


def merge_shards(folder: Path, options: StoreOptions, n_labels: int, upto: int) -> int:
    """Merge the reducers of the next shards, in their order, and remove their files.

    A run that is killed in between leaves a file that says how many shards it has seen.

    Args:
        folder: of the store.
        options: of the store.
        n_labels: of the corpus.
        upto: shards that are there.

    Returns:
        Shards that are merged now.
    """
    place = folder / REDUCED_NAME
    merged, done = ReducerSet(options, n_labels), 0
    if place.is_file():
        merged.reducers, done = read_reduced(place)
    for shard in range(done, upto):
        merged.absorb(read_reduced(folder / reduced_name(shard))[0])
    if upto > done or not place.is_file():
        merged.write(place, max(done, upto))
    for shard in range(max(done, upto)):
        (folder / reduced_name(shard)).unlink(missing_ok=True)
    return max(done, upto)
