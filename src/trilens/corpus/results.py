"""What the reducers of a store found: frozen results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilens.corpus.reducers import (
    ClassSums,
    ContextReducer,
    GatingReducer,
    HeadSums,
    MomentReducer,
    Reducer,
)
from trilens.errors import NotStoredError
from trilens.io.messages import listed
from trilens.statistics.gating import GatingStatistics

__all__ = [
    "HEAD_STATISTICS",
    "ClassMeans",
    "HeadStatistics",
    "Moments",
    "Reduced",
    "ReducedKey",
    "TopContexts",
    "result_of",
]

ReducedKey = tuple[str, str, int | None]
"""Kind of reducer, site or gate, layer."""

HEAD_STATISTICS = ("entropy_nats", "mean_distance_tokens", "sink_mass", "first_key_weight")
"""What is averaged over the queries of each head."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and covariance of a site's units over all tokens.

    Attributes:
        count: tokens.
        mean: float64 [units].
        variance: float64 [units], divided by the count.
        covariance: float64 [units, units], divided by the count; None of "mean".
    """

    count: int
    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None

    @property
    def second_moment(self) -> Tensor:
        """E[x xᵀ], float64 [units, units]: of a matrix's inputs, what calibration's Hessian is.

        Raises:
            NotStoredError: only means were reduced.
        """
        if self.covariance is None:
            raise NotStoredError("covariances were not reduced: capture with reduce=['covariance']")
        return self.covariance + torch.outer(self.mean, self.mean)


@dataclass(frozen=True, slots=True, eq=False)
class ClassMeans:
    """Means of a site per label.

    Attributes:
        labels: names of the classes.
        counts: int64 [labels], tokens.
        means: float64 [labels, units], over all tokens.
        last_counts: int64 [labels], documents.
        last_means: float64 [labels, units], over each document's last token.
    """

    labels: tuple[str, ...]
    counts: Tensor
    means: Tensor
    last_counts: Tensor
    last_means: Tensor

    def difference(self, label: str, other: str, *, last: bool = True) -> Tensor:
        """Mean of one class less that of another, float64 [units]: a steering vector.

        Raises:
            NotStoredError: a label that no document has.
        """
        for name in (label, other):
            if name not in self.labels:
                raise NotStoredError(
                    f"label {name!r} is of no document: the labels are {listed(self.labels, 8)}"
                )
        means = self.last_means if last else self.means
        return means[self.labels.index(label)] - means[self.labels.index(other)]


@dataclass(frozen=True, slots=True, eq=False)
class TopContexts:
    """The tokens at which each unit is largest, descending.

    Attributes:
        values: float32 [units, k]; −Inf where the corpus has fewer tokens.
        tokens: int64 [units, k], their numbers in the store, which `Store.locate` finds; −1
            where there is none.
    """

    values: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadStatistics:
    """Statistics of a layer's attention heads, averaged over all queries of the corpus.

    Attributes:
        count: queries.
        means: float64 [statistics, heads], in the order of `names`.
        names: "entropy_nats" of the row, "mean_distance_tokens" from query to key, "sink_mass"
            that no key got, "first_key_weight" of the first token of the window.
    """

    count: int
    means: Tensor
    names: tuple[str, ...] = HEAD_STATISTICS

    def __getitem__(self, name: str) -> Tensor:
        """One of them, float64 [heads]; `NotStoredError` where it is none."""
        if name not in self.names:
            raise NotStoredError(f"{name!r} is no statistic: they are {', '.join(self.names)}")
        return self.means[self.names.index(name)]


def _moments(reducer: MomentReducer, _labels: tuple[str, ...]) -> Moments:
    spread = reducer.squares / max(1, reducer.count)
    if spread.dim() == 1:
        return Moments(reducer.count, reducer.mean, spread)
    return Moments(reducer.count, reducer.mean, spread.diagonal().clone(), spread)


def _class_means(reducer: ClassSums, labels: tuple[str, ...]) -> ClassMeans:
    means = reducer.sums / reducer.counts.clamp(min=1)[..., None]
    return ClassMeans(labels, reducer.counts[0], means[0], reducer.counts[1], means[1])


def _heads(reducer: HeadSums, _labels: tuple[str, ...]) -> HeadStatistics:
    means = reducer.sums.reshape(len(HEAD_STATISTICS), -1) / max(1, reducer.count)
    return HeadStatistics(reducer.count, means)


_RESULTS: dict[type, Callable[[Any, tuple[str, ...]], Any]] = {
    MomentReducer: _moments,
    ClassSums: _class_means,
    ContextReducer: lambda reducer, _: TopContexts(reducer.values, reducer.tokens),
    GatingReducer: lambda reducer, _: reducer.tally.result(),
    HeadSums: _heads,
}


def result_of(reducer: Reducer, labels: tuple[str, ...]) -> Any:
    """The result of a reducer."""
    return _RESULTS[type(reducer)](reducer, labels)


class Reduced(Mapping[ReducedKey, Any]):
    """Results of a store's reducers: `reduced["mean", "resid_post", 8]` are `Moments`.

    Kinds: "mean" and "covariance" (`Moments`), "class_means" (`ClassMeans`), "top_contexts"
    (`TopContexts`), "gating" (`GatingStatistics`, of a gate), "attention" (`HeadStatistics`).
    """

    def __init__(self, reducers: Mapping[ReducedKey, Reducer], labels: tuple[str, ...]) -> None:
        self._reducers, self._labels = dict(reducers), labels

    def __getitem__(self, key: ReducedKey) -> Any:
        """One result; `NotStoredError` where it was not reduced."""
        if key not in self._reducers:
            held = listed(map(repr, self._reducers), 6)
            raise NotStoredError(f"{key!r} was not reduced: this store has {held}")
        return result_of(self._reducers[key], self._labels)

    def __contains__(self, key: object) -> bool:
        return key in self._reducers

    def __iter__(self) -> Iterator[ReducedKey]:
        return iter(self._reducers)

    def __len__(self) -> int:
        return len(self._reducers)

    def __repr__(self) -> str:
        return f"Reduced({listed(map(repr, self._reducers), 6)})"

    def rows(self) -> Iterator[dict[str, Any]]:
        """The numbers of gates and heads, as long-form rows."""
        for (kind, name, layer), reducer in self._reducers.items():
            found = result_of(reducer, self._labels)
            place = {"layer": layer, "module": name}
            if isinstance(found, GatingStatistics):
                for metric, value in found.summary().items():
                    if isinstance(value, float):
                        yield {**place, "head": None, "metric": f"{kind}.{metric}", "value": value}
            elif isinstance(found, HeadStatistics):
                for metric in found.names:
                    for head, value in enumerate(found[metric].tolist()):
                        yield {**place, "head": head, "metric": metric, "value": value}
