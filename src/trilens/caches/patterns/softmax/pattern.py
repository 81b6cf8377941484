"""The attention pattern of a softmax layer, kept as its q and k."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trilens.caches.indices import check_index, check_unpad
from trilens.caches.patterns.protocol import KeptPattern
from trilens.caches.patterns.softmax.blocks import (
    HeadGroup,
    SoftmaxInputs,
    Summary,
    column_weights,
    moments,
    row_blocks,
    row_weights,
    scores_of,
    shift,
    without_idle_mask,
)
from trilens.caches.patterns.softmax.checks import check_number, check_q_k, check_sinks, check_term
from trilens.caches.patterns.softmax.fused import summarise
from trilens.caches.patterns.softmax.masks import SharedMasks
from trilens.errors import ValueRangeError
from trilens.numbers import at_least

__all__ = ["SoftmaxPattern"]

_FEWEST_KEYS = 16


class SoftmaxPattern(KeptPattern):
    """softmax(scaling · q kᵀ + …) of one layer, computed where it is asked and nowhere else.

    q, k, mask and bias are kept by reference and detached; O(tokens) memory as long as the model
    made no mask. A score goes the way it goes in the models:

        s = scaling · q·k;  s = softcap · tanh(s / softcap);  s += bias;  s += mask

    Computed in float32 at least (float64 where q and k are). Log-sum-exp and entropy of a prompt
    are computed in one pass, mean distance and received weight in another; each once, then kept.

    A query that may see nothing attends to nothing: its row is all zeros, its entropy, distance
    and mean weights 0, its log-sum-exp −inf. Some kernels give such a row uniform weights, an
    artefact of adding one finite minimum to every score; nothing reads the output of such a row
    (it belongs to padding), and uniform weights would say that it looked at hidden tokens.

    Args:
        q: [batch, heads, seq_q, d_head], after rotation.
        k: [batch, kv_heads, seq_k, d_head], after rotation. Query head h reads key head
            h // (heads // kv_heads).
        scaling: factor of q·k.
        mask: [1 or batch, 1 or heads, 1 or seq_q, seq_k]; bool (True: may attend) or additive,
            where values up to half the dtype's minimum count as masked.
        causal: key j is hidden from query i unless j ≤ i + query_offset.
        query_offset: keys before the first query.
        softcap: bound that the scores approach, before bias and mask.
        bias: additive, [1 or batch, 1 or heads, 1 or seq_q, seq_k].
        sinks: [heads], the logit of a sink that takes its share of every row and is no key. Rows
            then sum to 1 − sink mass.

    Raises:
        ShapeError: axes that do not fit each other.
        DtypeError: a tensor of the wrong dtype.
        ValueRangeError: scaling not finite, softcap not positive, query_offset negative.
        UsageError: not a tensor, or tensors on several devices.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scaling: float,
        mask: Tensor | None = None,
        causal: bool = False,
        query_offset: int = 0,
        softcap: float | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        check_q_k(q, k)
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        self._q = q.detach()
        self._k = k.detach()
        self._scaling = check_number(scaling, "scaling")
        self._causal = bool(causal)
        self._query_offset = at_least(0, query_offset, "query_offset")
        self._softcap = None if softcap is None else check_number(softcap, "softcap")
        if self._softcap is not None and self._softcap <= 0:
            raise ValueRangeError(f"softcap {softcap} is out of range: it has to be above 0")
        self._mask = None if mask is None else check_term(mask, shape, "mask", q)
        self._bias = None if bias is None else check_term(bias, shape, "bias", q)
        self._sinks = None if sinks is None else check_sinks(sinks, q)
        self._summaries: dict[int, Summary] = {}
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (*self._q.shape[:3], self._k.shape[2])

    @property
    def signed(self) -> bool:
        """False: a softmax has no negative weights."""
        return False

    @property
    def q(self) -> Tensor:
        """The queries [batch, heads, seq_q, d_head], by reference."""
        return self._q

    @property
    def k(self) -> Tensor:
        """The keys [batch, kv_heads, seq_k, d_head], by reference."""
        return self._k

    @property
    def mask(self) -> Tensor | None:
        """The mask, by reference."""
        return self._mask

    @property
    def causal(self) -> bool:
        """Whether later keys are hidden besides what the mask hides."""
        return self._causal

    @property
    def dense_bytes(self) -> int:
        """Bytes that `dense()` takes."""
        size = self.batch * self.heads * self.seq_q * self.seq_k
        return size * self._inputs(0).dtype.itemsize

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        """One product of these queries with the keys; nothing else is computed."""
        inputs = self._inputs(row, head)
        queries = torch.tensor(positions, dtype=torch.long, device=self._q.device)
        out = self._q.new_empty((inputs.heads, len(positions), self.seq_k), dtype=inputs.dtype)
        for group, start, stop in _row_walk(inputs, len(positions)):
            out[group.heads, start:stop] = row_weights(group, queries[start:stop])
        return out

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        """The first question of this kind computes the prompt's log-sum-exp."""
        lse = self._summary(row).lse
        if head is not None:
            lse = lse[head : head + 1]
        # PROMOTE: a product with few keys may add up in one long chain, which costs a digit at
        # scores of 90; with this many it adds up as that of a whole row does.
        padded = positions + positions[-1:] * (_FEWEST_KEYS - len(positions))
        keys = torch.tensor(padded, dtype=torch.long, device=lse.device)
        found = column_weights(self._inputs(row, head), lse, keys)
        return found if len(padded) == len(positions) else found[..., : len(positions)].clone()

    def lse(self, batch: int = 0) -> Tensor:
        """Log-sum-exp of each row's scores, without the sink: [heads, seq_q], −inf for no key."""
        return self._summary(batch).lse + shift(self._inputs(batch))

    def entropy(self, batch: int = 0) -> Tensor:
        """Entropy of each row in nats, renormalised over its keys, in [0, ln seq_k]."""
        return self._summary(batch).entropy.clone()

    def mean_distance(self, batch: int = 0) -> Tensor:
        """Mean |query + query_offset − key| in tokens of the renormalised row: [heads, seq_q]."""
        return self._moments_of(batch)[0].clone()

    def received(self, batch: int = 0) -> Tensor:
        """Mean raw weight from the queries that may see the key, 0 where none may."""
        return self._moments_of(batch)[1].clone()

    def sink_mass(self, batch: int = 0) -> Tensor:
        """Share of each row that the sink takes: [heads, seq_q], 0 without a sink.

        With a sink, a query that may see nothing gives it everything: 1.
        """
        inputs = self._inputs(batch)
        if inputs.sinks is None:
            return self._q.new_zeros((self.heads, self.seq_q), dtype=inputs.dtype)
        return torch.sigmoid(inputs.sinks.to(inputs.dtype)[:, None] - self.lse(batch))

    def dense(self) -> Tensor:
        """The whole pattern: [batch, heads, seq_q, seq_k].

        Memory
            `dense_bytes`: 800 MB for 12 heads of 4,096 tokens.
        """
        shape = (self.batch, self.heads, self.seq_q, self.seq_k)
        out = self._q.new_empty(shape, dtype=self._inputs(0).dtype)
        for batch in range(self.batch):
            inputs = self._inputs(batch)
            for group, start, stop in _row_walk(inputs, self.seq_q):
                out[batch, group.heads, start:stop] = row_weights(group, slice(start, stop))
        return out

    def scores(self) -> Tensor:
        """What the softmax was given: [batch, heads, seq_q, seq_k], −inf where masked.

        Scaled, with soft cap, bias and mask; memory as `dense`.
        """
        shape = (self.batch, self.heads, self.seq_q, self.seq_k)
        out = self._q.new_empty(shape, dtype=self._inputs(0).dtype)
        for batch in range(self.batch):
            # Centring moves all scores of a row, which only their softmax does not see.
            inputs = replace(self._inputs(batch), centre=None)
            for group, start, stop in _row_walk(inputs, self.seq_q):
                rows, keys = slice(start, stop), slice(0, self.seq_k)
                out[batch, group.heads, start:stop] = scores_of(
                    group.inputs, group.keys, rows, keys
                )
        return out

    def unpad(self, row: int, n: int, shared: SharedMasks | None = None) -> SoftmaxPattern:
        """One prompt of a batch that was padded on the right, with tensors of its own.

        A mask that says no more than causality for these tokens is dropped.

        Args:
            row: the prompt's batch row.
            n: its real tokens.
            shared: one for all layers of the batch, so that layers share the masks that stay.

        Returns:
            A pattern with batch 1, seq_q = seq_k = n, that keeps nothing of the batch alive.

        Raises:
            OutOfRangeError: no such row.
            ValueRangeError: n is not in 1 … seq_q.
            UsageError: queries and keys are not the same tokens.
        """
        row, n = check_unpad(
            row,
            n,
            batch=self.batch,
            seq_q=self.seq_q,
            seq_k=self.seq_k,
            query_offset=self._query_offset,
        )
        masks = SharedMasks() if shared is None else shared
        mask, causal = masks.cut_mask(self._mask, row, n, causal=self._causal)
        return SoftmaxPattern(
            self._q[row : row + 1, :, :n].clone(memory_format=torch.contiguous_format),
            self._k[row : row + 1, :, :n].clone(memory_format=torch.contiguous_format),
            scaling=self._scaling,
            mask=mask,
            causal=causal,
            softcap=self._softcap,
            bias=masks.cut_bias(self._bias, row, n),
            # Sinks are the model's own parameter, in one piece: nothing of the batch.
            sinks=self._sinks,
        )

    def tensors(self) -> dict[str, Tensor]:
        """q, k and, where there are any, mask, bias and sinks; by reference, maybe views."""
        named = {
            "q": self._q,
            "k": self._k,
            "mask": self._mask,
            "bias": self._bias,
            "sinks": self._sinks,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def params(self) -> dict[str, Any]:
        """The other arguments of the constructor, and the kind."""
        return {
            "kind": "softmax",
            "scaling": self._scaling,
            "causal": self._causal,
            "query_offset": self._query_offset,
            "softcap": self._softcap,
        }

    def __repr__(self) -> str:
        own = ", ".join(name for name in ("mask", "bias", "sinks") if name in self.tensors())
        return (
            f"SoftmaxPattern(batch {self.batch}, heads {self.heads}, seq_q {self.seq_q}, "
            f"seq_k {self.seq_k}, {self._q.dtype}, causal {self._causal}"
            f"{', with ' + own if own else ''})"
        )

    def _inputs(self, batch: int, head: int | None = None) -> SoftmaxInputs:
        row = self._row(batch)
        inputs = SoftmaxInputs(
            q=self._q[row],
            k=self._k[row],
            scaling=self._scaling,
            causal=self._causal,
            query_offset=self._query_offset,
            softcap=self._softcap,
            mask=_row_of(self._mask, row),
            bias=_row_of(self._bias, row),
            sinks=self._sinks,
            centre=None,
        )
        if head is not None:
            one = check_index(head, self.heads, "head", "this pattern")
            inputs = inputs.only(slice(one, one + 1))
        # A softcap bends the scores, so that moving them all would change the weights.
        return inputs if self._softcap is not None else inputs.centred()

    def _summary(self, batch: int) -> Summary:
        row = self._row(batch)
        if row not in self._summaries:
            self._summaries[row] = summarise(without_idle_mask(self._inputs(row)))
        return self._summaries[row]

    def _moments_of(self, batch: int) -> tuple[Tensor, Tensor]:
        row = self._row(batch)
        if row not in self._moments:
            inputs = without_idle_mask(self._inputs(row))
            self._moments[row] = moments(inputs, self._summary(row).lse)
        return self._moments[row]


def _row_walk(inputs: SoftmaxInputs, n: int) -> Iterator[tuple[HeadGroup, int, int]]:
    """Groups of heads × blocks of n query positions."""
    step, groups = row_blocks(inputs)
    for group in groups:
        for start in range(0, n, step):
            yield group, start, min(start + step, n)


def _row_of(term: Tensor | None, row: int) -> Tensor | None:
    return None if term is None else term[row if term.shape[0] > 1 else 0]
