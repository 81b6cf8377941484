"""Reducers: what a whole corpus says of a place, in memory that does not grow with it.

Each is fed rows in order, absorbs the reducer of a later shard, and gives its state as tensors.
Sums are float64 about the running mean, so that shards give what one pass gives.

Source: the merging of means and sums of squares is Chan, Golub and LeVeque (1979), equation 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from trilens.errors import NonFiniteError
from trilens.statistics.gating import GatingAccumulator

__all__ = [
    "ClassSums",
    "ContextReducer",
    "GatingReducer",
    "HeadSums",
    "MomentReducer",
    "Reducer",
    "Rows",
    "State",
]

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Values of some tokens, and which tokens.

    Shapes: values [n, units]; tokens int64 [n], numbers in the store; labels int64 [n], −1 for
        none; last bool [n], whether a document ends with the token
    """

    values: Tensor
    tokens: Tensor
    labels: Tensor
    last: Tensor


class Reducer(Protocol):
    """What every reducer can do."""

    def update(self, rows: Rows) -> None:
        """Take in rows."""

    def absorb(self, later: Any) -> None:
        """Take in what the reducer of a later shard has seen."""

    def state(self) -> State:
        """Everything it knows, as tensors."""

    @classmethod
    def rebuilt(cls, state: State) -> Self:
        """The reducer that gave this state."""


class MomentReducer:
    """Count, mean, and sums of squares about the mean: of each unit, or of every pair."""

    def __init__(self, units: int, *, pairs: bool) -> None:
        self.count = 0
        self.mean = torch.zeros(units, dtype=torch.float64)
        self.squares = torch.zeros((units, units) if pairs else units, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        """Take in rows."""
        # PROMOTE: second moments over millions of tokens cancel in float32.
        values = rows.values.to("cpu", torch.float64)
        if not bool(values.isfinite().all()):
            raise NonFiniteError("a value is NaN or Inf: its mean and covariance are not defined")
        mean = values.mean(0)
        centred = values - mean
        pairs = self.squares.dim() == 2
        squares = centred.T @ centred if pairs else centred.square().sum(0)
        self._join(len(values), mean, squares)

    def absorb(self, later: MomentReducer) -> None:
        """Take in what the reducer of a later shard has seen."""
        self._join(later.count, later.mean, later.squares)

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        if not count:
            return
        delta = mean - self.mean
        outer = torch.outer(delta, delta) if squares.dim() == 2 else delta.square()
        self.squares += squares + outer * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def state(self) -> State:
        """Everything it knows, as tensors."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "squares": self.squares}

    @classmethod
    def rebuilt(cls, state: State) -> Self:
        """The reducer that gave this state."""
        found = cls(len(state["mean"]), pairs=state["squares"].dim() == 2)
        found.count = int(state["count"])
        found.mean, found.squares = state["mean"], state["squares"]
        return found


class ClassSums:
    """Per label the sums of all tokens, and of each document's last token."""

    def __init__(self, units: int, labels: int) -> None:
        self.counts = torch.zeros((2, labels), dtype=torch.int64)
        self.sums = torch.zeros((2, labels, units), dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        """Take in rows."""
        values = rows.values.to("cpu", torch.float64)
        for which, chosen in enumerate((rows.labels >= 0, (rows.labels >= 0) & rows.last)):
            labels = rows.labels[chosen]
            self.counts[which] += labels.bincount(minlength=self.counts.shape[1])
            self.sums[which].index_add_(0, labels, values[chosen])

    def absorb(self, later: ClassSums) -> None:
        """Take in what the reducer of a later shard has seen."""
        self.counts += later.counts
        self.sums += later.sums

    def state(self) -> State:
        """Everything it knows, as tensors."""
        return {"counts": self.counts, "sums": self.sums}

    @classmethod
    def rebuilt(cls, state: State) -> Self:
        """The reducer that gave this state."""
        found = cls(state["sums"].shape[2], state["sums"].shape[1])
        found.counts, found.sums = state["counts"], state["sums"]
        return found


class ContextReducer:
    """The k tokens at which each unit is largest; of equal values the earlier token."""

    def __init__(self, units: int, k: int) -> None:
        self.values = torch.full((units, k), -torch.inf)
        self.tokens = torch.full((units, k), -1)

    def update(self, rows: Rows) -> None:
        """Take in rows."""
        values = rows.values.to("cpu", torch.float32)
        order = rows.tokens.argsort()  # topk of rows in the order of their tokens: ties stay so
        k = min(self.values.shape[1], len(values))
        sorted_values, places = values[order].T.sort(dim=1, descending=True, stable=True)
        self._join(sorted_values[:, :k], rows.tokens[order][places[:, :k]])

    def absorb(self, later: ContextReducer) -> None:
        """Take in what the reducer of a later shard has seen."""
        self._join(later.values, later.tokens)

    def _join(self, values: Tensor, tokens: Tensor) -> None:
        k = self.values.shape[1]
        values = torch.cat([self.values, values], 1)
        tokens = torch.cat([self.tokens, tokens], 1)
        by_token = tokens.argsort(dim=1, stable=True)
        values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
        ranked, places = values.sort(dim=1, descending=True, stable=True)
        self.values = ranked[:, :k].contiguous()
        self.tokens = tokens.gather(1, places[:, :k])

    def state(self) -> State:
        """Everything it knows, as tensors."""
        return {"values": self.values, "tokens": self.tokens}

    @classmethod
    def rebuilt(cls, state: State) -> Self:
        """The reducer that gave this state."""
        found = cls(*state["values"].shape)
        found.values, found.tokens = state["values"], state["tokens"]
        return found


class GatingReducer:
    """A `GatingAccumulator` over the openness of one gate."""

    _VECTORS: ClassVar = {"sum": np.float64, "rest": np.float64, "low": np.int64, "high": np.int64}

    def __init__(self, units: int, threshold: float) -> None:
        self.tally = GatingAccumulator(threshold, units)

    def update(self, rows: Rows) -> None:
        """Take in rows."""
        self.tally.update(rows.values.to("cpu"))

    def absorb(self, later: GatingReducer) -> None:
        """Take in what the reducer of a later shard has seen."""
        self.tally = self.tally.merge(later.tally)

    def state(self) -> State:
        """Everything it knows, as tensors."""
        plain = self.tally.to_dict()
        found = {
            name: torch.from_numpy(np.asarray(plain[name], kind))
            for name, kind in self._VECTORS.items()
        }
        head = [plain["threshold"], float(plain["n_steps"])]
        return {**found, "head": torch.tensor(head, dtype=torch.float64)}

    @classmethod
    def rebuilt(cls, state: State) -> Self:
        """The reducer that gave this state."""
        threshold, steps = state["head"].tolist()
        found = cls(len(state["sum"]), threshold)
        vectors = {name: state[name].tolist() for name in cls._VECTORS}
        plain = {**vectors, "threshold": threshold, "n_steps": int(steps)}
        found.tally = GatingAccumulator.from_dict({**plain, "n_units": len(state["sum"])})
        return found


class HeadSums:
    """Per head the sums of statistics of its rows, over all queries."""

    def __init__(self, units: int) -> None:
        self.count = 0
        self.sums = torch.zeros(units, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        """Take in rows: [queries, statistics · heads]."""
        self.count += len(rows.values)
        self.sums += rows.values.to("cpu", torch.float64).sum(0)

    def absorb(self, later: HeadSums) -> None:
        """Take in what the reducer of a later shard has seen."""
        self.count += later.count
        self.sums += later.sums

    def state(self) -> State:
        """Everything it knows, as tensors."""
        return {"count": torch.tensor(self.count), "sums": self.sums}

    @classmethod
    def rebuilt(cls, state: State) -> Self:
        """The reducer that gave this state."""
        found = cls(len(state["sums"]))
        found.count, found.sums = int(state["count"]), state["sums"]
        return found
