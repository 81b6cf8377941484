"""The unsigned view of a signed pattern, and the statistics of rows without a softmax."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilens.caches.patterns.protocol import BLOCK_BYTES, Device, Moved, Pattern
from trilens.caches.patterns.softmax.masks import SharedMasks

__all__ = ["ReluL1Pattern", "RowSummary", "SummarisedPattern", "row_blocks", "summarise"]


@dataclass(frozen=True, slots=True)
class RowSummary:
    """What one walk over all rows of a prompt finds, negative weights dropped.

    Shapes
        mass, entropy, mean_distance [heads, seq_q]; received [heads, seq_k]

    Attributes:
        mass: sum of each row.
        entropy: of the row divided by its mass, in nats; 0 for a row without mass.
        mean_distance: of the row divided by its mass, in tokens.
        received: mean, over the queries that may see the key, of the rows divided by their mass.
    """

    mass: Tensor
    entropy: Tensor
    mean_distance: Tensor
    received: Tensor


def summarise(pattern: Pattern, batch: int, *, causal: bool) -> RowSummary:
    """Walk over a prompt's rows in blocks of at most 32 MiB.

    Args:
        pattern: any pattern; queries and keys are the same tokens, or the queries the last ones.
        batch: the prompt's row of the batch.
        causal: a key is seen by every query that does not come before it. Else it counts as seen
            by the queries that give it a weight other than 0.
    """
    masses: list[Tensor] = []
    entropies: list[Tensor] = []
    distances: list[Tensor] = []
    received = seen = keys = torch.zeros(())
    for positions in row_blocks(pattern):
        raw = pattern.rows(positions, batch=batch)
        if not masses:
            received = raw.new_zeros((pattern.heads, pattern.seq_k))
            seen = torch.zeros_like(received)
            keys = torch.arange(pattern.seq_k, device=raw.device)
        queries = torch.tensor(positions, device=raw.device)
        queries += max(0, pattern.seq_k - pattern.seq_q)
        gap = queries[:, None] - keys
        visible = (gap >= 0).expand_as(raw) if causal else raw != 0
        seen += visible.sum(1)
        weights = raw.relu_()
        mass = weights.sum(-1)
        weights.div_(mass.masked_fill(mass == 0, 1)[..., None])
        masses.append(mass)
        received += weights.sum(1)
        distances.append((weights * gap.abs()).sum(-1))
        entropies.append(torch.special.entr(weights).sum(-1).clamp_(min=0))
    return RowSummary(
        mass=torch.cat(masses, dim=1),
        entropy=torch.cat(entropies, dim=1),
        mean_distance=torch.cat(distances, dim=1),
        received=received.div_(seen.clamp_(min=1)),
    )


def row_blocks(pattern: Pattern) -> Iterator[range]:
    """Query positions in blocks whose rows, and two copies of them, take 32 MiB at most."""
    step = max(1, BLOCK_BYTES * pattern.seq_q // (3 * max(1, pattern.dense_bytes // pattern.batch)))
    for start in range(0, pattern.seq_q, step):
        yield range(start, min(start + step, pattern.seq_q))


class SummarisedPattern(Pattern):
    """An unsigned pattern whose statistics come from one walk over a prompt's rows, kept."""

    __slots__ = ()

    _summaries: dict[int, RowSummary]

    @property
    def signed(self) -> bool:
        """False: no weight is negative."""
        return False

    def entropy(self, batch: int = 0) -> Tensor:
        """Entropy of each row in nats, in [0, ln seq_k], 0 for a row of zeros: [heads, seq_q]."""
        return self._summary(batch).entropy.clone()

    def mean_distance(self, batch: int = 0) -> Tensor:
        """Mean distance in tokens between query and key: [heads, seq_q], 0 for a row of zeros."""
        return self._summary(batch).mean_distance.clone()

    def received(self, batch: int = 0) -> Tensor:
        """Mean weight that a key gets from the queries that may see it: [heads, seq_k]."""
        return self._summary(batch).received.clone()

    def sink_mass(self, batch: int = 0) -> Tensor:
        """Zeros: a normalised row leaves nothing over, and a row of zeros has no sink."""
        return torch.zeros_like(self._summary(batch).mass)

    def _summary(self, batch: int) -> RowSummary:
        row = self._row(batch)
        if row not in self._summaries:
            self._summaries[row] = self._summarise(row)
        return self._summaries[row]

    @abstractmethod
    def _summarise(self, row: int) -> RowSummary:
        """The walk itself."""


class ReluL1Pattern(SummarisedPattern):
    """A view of a signed pattern: negative weights dropped, each row divided by what is left.

    It answers what a signed pattern cannot: entropy, distance, received weight. What the negative
    weights said is gone, so whoever wants it says so by asking for this view. A row without a
    positive weight stays all zeros. Rows cost what they cost in the pattern below; the first
    column or statistic of a prompt walks over all its rows once and keeps a few numbers per token.

    Args:
        base: the pattern to look at.
        causal: a key is seen by every query that does not come before it (for `received`); else by
            the queries whose raw weight on it is not 0.
    """

    __slots__ = ("_base", "_causal", "_summaries")

    def __init__(self, base: Pattern, *, causal: bool = False) -> None:
        self._base = base
        self._causal = bool(causal)
        self._summaries: dict[int, RowSummary] = {}

    @property
    def base(self) -> Pattern:
        """The pattern below, with its signs."""
        return self._base

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self._base.batch, self._base.heads, self._base.seq_q, self._base.seq_k

    @property
    def dense_bytes(self) -> int:
        """Bytes that `dense()` takes."""
        return self._base.dense_bytes

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        weights = self._base.rows(positions, head, row).relu()
        mass = weights.sum(-1, keepdim=True)
        return weights.div_(mass.masked_fill_(mass == 0, 1))

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        weights = self._base.columns(positions, head, row).relu()
        mass = self._summary(row).mass
        if head is not None:
            mass = mass[head : head + 1]
        return weights.div_(mass.masked_fill(mass == 0, 1)[..., None])

    def dense(self) -> Tensor:
        """The whole pattern: [batch, heads, seq_q, seq_k].

        Memory
            `dense_bytes`, twice while it is built.
        """
        # PROMOTE: sums over seq_k half-precision weights keep two digits at best.
        weights = self._base.dense()
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).relu()
        mass = weights.sum(-1, keepdim=True)
        return weights.div_(mass.masked_fill_(mass == 0, 1))

    def unpad(self, row: int, n: int, shared: SharedMasks | None = None) -> ReluL1Pattern:
        """One prompt of a batch padded on the right: the view of the unpadded pattern.

        Raises:
            OutOfRangeError, ValueRangeError, UsageError: as in the pattern below.
        """
        return ReluL1Pattern(self._base.unpad(row, n, shared), causal=self._causal)

    def to(self, device: Device, moved_so_far: Moved | None = None) -> ReluL1Pattern:
        """The view on another device; kept answers stay behind."""
        return ReluL1Pattern(self._base.to(device, moved_so_far), causal=self._causal)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the pattern below."""
        return self._base.tensors()

    def params(self) -> dict[str, Any]:
        """The kind, `causal`, and the `params` of the pattern below."""
        return {"kind": "relu_l1", "causal": self._causal, "base": self._base.params()}

    def __repr__(self) -> str:
        return f"ReluL1Pattern({self._base!r})"

    def _summarise(self, row: int) -> RowSummary:
        return summarise(self._base, row, causal=self._causal)
