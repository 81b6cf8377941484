"""The hot loops of `SoftmaxPattern`: scores, weights and statistics of one prompt, block by block.

A block is some query positions of some heads against the keys they may see. Keys are promoted and
centred once per group of heads; no [seq_q, seq_k] matrix is ever alive.

Centring: a softmax does not change when the same number is added to all scores of a row, so the
mean key may be taken off every key. Families with a large key bias have scores in the hundreds
that differ little between keys; centred, their float32 scores keep their digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trilens.caches.patterns.protocol import BLOCK_BYTES
from trilens.caches.patterns.softmax.masks import implied_causality, visible

__all__ = [
    "HeadGroup",
    "SoftmaxInputs",
    "Summary",
    "column_weights",
    "head_groups",
    "moments",
    "row_blocks",
    "row_weights",
    "scores_of",
    "shift",
    "spans",
    "summarise_block",
    "without_idle_mask",
]

# Score bytes of one block. At most four tensors of that size are alive at once; on the CPU, what
# fits the cache is twice as fast as what fills the ceiling.
_SCORE_BYTES_CPU = 2 * 2**20
_SCORE_BYTES = BLOCK_BYTES // 4
_MOST_ROWS = 256

Index = slice | Tensor


@dataclass(frozen=True, slots=True)
class SoftmaxInputs:
    """One prompt's (or some of its heads') way from q and k to weights.

    Shapes
        q [heads, seq_q, d_head], k [kv_heads, seq_k, d_head]; mask and bias [1 or heads, 1 or
        seq_q, seq_k]; sinks [heads]; centre [kv_heads, d_head], already in the dtype of compute.
    """

    q: Tensor
    k: Tensor
    scaling: float
    causal: bool
    query_offset: int
    softcap: float | None
    mask: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    centre: Tensor | None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[0]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[0] // self.k.shape[0]

    @property
    def seq_q(self) -> int:
        """Query positions."""
        return self.q.shape[1]

    @property
    def seq_k(self) -> int:
        """Key positions."""
        return self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of compute: float32 at least."""
        # PROMOTE: a bfloat16 score of 20 is off by 0.06, a weight then by 6 %.
        return torch.promote_types(torch.promote_types(self.q.dtype, self.k.dtype), torch.float32)

    def centred(self) -> SoftmaxInputs:
        """The same with the mean key of each head as its centre."""
        # A key behind a mask may hold anything: it must not poison the others.
        mean = self.k.mean(1, dtype=self.dtype).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return replace(self, centre=mean)

    def only(self, heads: slice) -> SoftmaxInputs:
        """The given query heads: whole groups, or heads of one group."""
        group = self.group
        kv = slice(heads.start // group, (heads.stop - 1) // group + 1)
        return replace(
            self,
            q=self.q[heads],
            k=self.k[kv],
            mask=_heads_of(self.mask, heads),
            bias=_heads_of(self.bias, heads),
            sinks=None if self.sinks is None else self.sinks[heads],
            centre=None if self.centre is None else self.centre[kv],
        )


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Some heads of the inputs with their keys promoted and centred.

    Shapes
        keys [kv_heads of the group, seq_k, d_head].
    """

    inputs: SoftmaxInputs
    heads: slice
    keys: Tensor


@dataclass(frozen=True, slots=True)
class Summary:
    """What one pass over the scores leaves behind, per query position.

    Shapes
        lse, entropy [heads, seq_q]. lse is that of the centred scores, −inf where nothing is
        visible; entropy is in nats, over the keys alone.
    """

    lse: Tensor
    entropy: Tensor


def without_idle_mask(inputs: SoftmaxInputs) -> SoftmaxInputs:
    """The same inputs, without a mask that says no more than causality: that is much faster."""
    if inputs.mask is None:
        return inputs
    causal = implied_causality(
        inputs.mask,
        seq_q=inputs.seq_q,
        seq_k=inputs.seq_k,
        causal=inputs.causal,
        query_offset=inputs.query_offset,
    )
    return inputs if causal is None else replace(inputs, mask=None, causal=causal)


def shift(inputs: SoftmaxInputs) -> Tensor:
    """What centring took off every score of a row: [heads, seq_q]."""
    out = inputs.q.new_zeros((inputs.heads, inputs.seq_q), dtype=inputs.dtype)
    if inputs.centre is not None:
        for head in range(inputs.heads):
            torch.mv(
                inputs.q[head].to(inputs.dtype), inputs.centre[head // inputs.group], out=out[head]
            )
        out *= inputs.scaling
    return out


def head_groups(inputs: SoftmaxInputs, bytes_per_kv_head: int) -> Iterator[HeadGroup]:
    """Cut the heads into groups whose keys, and whatever is counted per key head, fit a block."""
    group = inputs.group
    step = max(1, BLOCK_BYTES // 4 // max(1, bytes_per_kv_head))
    for start in range(0, inputs.heads, step * group):
        heads = slice(start, min(start + step * group, inputs.heads))
        part = inputs.only(heads)
        keys = part.k.to(part.dtype)
        if part.centre is not None:
            keys = keys - part.centre[:, None]
        yield HeadGroup(part, heads, keys)


def row_blocks(inputs: SoftmaxInputs) -> tuple[int, Iterator[HeadGroup]]:
    """How to walk: query positions per block, and the groups of heads to take at once."""
    item = inputs.dtype.itemsize
    budget = _SCORE_BYTES_CPU if inputs.q.device.type == "cpu" else _SCORE_BYTES
    row_bytes = inputs.group * inputs.seq_k * item
    step = min(max(1, budget // row_bytes), _MOST_ROWS, inputs.seq_q)
    # As many key heads at once as keep the block's scores within the budget.
    per_head = max(
        inputs.seq_k * inputs.q.shape[-1] * item, step * row_bytes * (_SCORE_BYTES // budget)
    )
    return step, head_groups(inputs, per_head)


def spans(inputs: SoftmaxInputs, step: int) -> list[tuple[slice, slice]]:
    """Blocks of `step` query positions, each with its keys from the first to the last visible."""
    found = []
    for start in range(0, inputs.seq_q, step):
        rows = slice(start, min(start + step, inputs.seq_q))
        low, high = 0, inputs.seq_k
        if inputs.causal:
            high = min(high, rows.stop + inputs.query_offset)
        if inputs.mask is not None:
            seen = visible(_rows_of(inputs.mask, rows)[..., :high]).flatten(0, 1).any(0).nonzero()
            low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
        found.append((rows, slice(low, high)))
    return found


def row_weights(group: HeadGroup, rows: Index) -> Tensor:
    """Weights of the given queries over all keys, with their raw mass.

    Returns:
        [heads, n, seq_k]; masked weights are exactly 0, a row that may see nothing is all 0.
    """
    inputs = group.inputs
    scores = scores_of(inputs, group.keys, rows, slice(0, inputs.seq_k))
    top = _finite(scores.amax(-1, keepdim=True))
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    weights.div_(total.masked_fill(total == 0, 1))
    if inputs.sinks is not None:
        lse = (total.log() + top).squeeze(-1) + shift(replace(inputs, q=inputs.q[:, rows]))
        weights.mul_(_kept(lse, inputs.sinks)[..., None])
    return weights


def column_weights(inputs: SoftmaxInputs, lse: Tensor, positions: Tensor) -> Tensor:
    """Weights of all queries on the given keys, with their raw mass: [heads, seq_q, n].

    Args:
        inputs: one prompt.
        lse: [heads, seq_q] of the centred scores, from the summary.
        positions: [n] key positions.
    """
    out = inputs.q.new_empty((inputs.heads, inputs.seq_q, len(positions)), dtype=inputs.dtype)
    for head in range(inputs.heads):
        part = inputs.only(slice(head, head + 1))
        keys = part.k[:, positions].to(part.dtype)
        if part.centre is not None:
            keys = keys - part.centre[:, None]
        own = lse[head : head + 1]
        weights = scores_of(part, keys, slice(0, part.seq_q), positions)
        weights.sub_(_finite(own)[..., None]).exp_().clamp_(max=1)
        if part.sinks is not None:
            weights.mul_(_kept(own + shift(part), part.sinks)[..., None])
        out[head] = weights[0]
    return out


def summarise_block(group: HeadGroup, rows: slice, columns: slice) -> Summary:
    """The summary of some query positions, from their scores against the keys of their span."""
    inputs = group.inputs
    if columns.stop <= columns.start:
        empty = inputs.q.new_zeros((inputs.heads, rows.stop - rows.start), dtype=inputs.dtype)
        return Summary(torch.full_like(empty, -torch.inf), empty)
    scores = scores_of(inputs, group.keys[:, columns], rows, columns)
    top = _finite(scores.amax(-1, keepdim=True))
    weights = scores.sub_(top).exp()
    total = weights.sum(-1)
    # PROMOTE: −inf · 0 is NaN; the lowest finite number · 0 is the 0 that is meant.
    scores.clamp_(min=torch.finfo(scores.dtype).min)
    inner = weights.mul_(scores).sum(-1)
    log_total = total.log()
    entropy = (log_total - inner / total.clamp(min=1)).clamp_(min=0)
    return Summary(log_total + top.squeeze(-1), entropy.masked_fill_(total == 0, 0))


def moments(inputs: SoftmaxInputs, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mean distance of every query and mean weight received by every key, in one pass.

    Args:
        inputs: one prompt.
        lse: [heads, seq_q] of the centred scores, from the summary.

    Returns:
        mean_distance [heads, seq_q] in tokens, received [heads, seq_k].
    """
    device = inputs.q.device
    distance = torch.zeros(inputs.heads, inputs.seq_q, dtype=inputs.dtype, device=device)
    received = torch.zeros(inputs.heads, inputs.seq_k, dtype=inputs.dtype, device=device)
    positions = torch.arange(inputs.seq_k, device=device)
    kept = torch.ones_like(distance)
    if inputs.sinks is not None:
        kept = _kept(lse + shift(inputs), inputs.sinks)
    step, groups = row_blocks(inputs)
    walk = spans(inputs, step)
    for group in groups:
        own = group.heads
        for rows, columns in walk:
            if columns.stop <= columns.start:
                continue
            weights = scores_of(group.inputs, group.keys[:, columns], rows, columns)
            weights.sub_(_finite(lse[own, rows])[..., None]).exp_()
            received[own, columns] += torch.bmm(kept[own, None, rows], weights)[:, 0]
            queries = _positions(rows, device) + inputs.query_offset
            distance[own, rows] = _distances(weights, queries, positions[columns], inputs.causal)
    return distance, received.div_(_seen_by(inputs).clamp_(min=1))


def _distances(weights: Tensor, queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """Σ weight · |query − key| of each row, in place of the weights: [heads, n].

    Where no key comes after its query the distance is linear in the key's position, and one
    matrix-vector product gives it.
    """
    if not causal:
        gaps = (queries[:, None] - keys).abs_().to(weights.dtype)
        return weights.mul_(gaps).sum(-1)
    # PROMOTE: counted from the block's last query, near keys keep their digits at position 1e6.
    last = queries[-1]
    columns = torch.stack([last - keys, torch.ones_like(keys)], dim=-1).to(weights.dtype)
    sums = weights @ columns
    return (sums[..., 0] - sums[..., 1] * (last - queries).to(weights.dtype)).clamp_(min=0)


def _seen_by(inputs: SoftmaxInputs) -> Tensor:
    """How many queries may see each key: [1 or heads, seq_k]."""
    device = inputs.q.device
    keys = torch.arange(inputs.seq_k, device=device)
    terms = [term for term in (inputs.mask, inputs.bias) if term is not None]
    if not terms:
        hidden = (keys - inputs.query_offset).clamp_(0, inputs.seq_q) if inputs.causal else keys * 0
        return (inputs.seq_q - hidden)[None].to(inputs.dtype)
    counts = inputs.q.new_zeros((max(map(len, terms)), inputs.seq_k), dtype=inputs.dtype)
    step = max(1, _SCORE_BYTES_CPU // (counts.shape[0] * inputs.seq_k))
    for start in range(0, inputs.seq_q, step):
        rows = slice(start, min(start + step, inputs.seq_q))
        seen = torch.ones(1, rows.stop - start, inputs.seq_k, dtype=torch.bool, device=device)
        for term in terms:
            seen = seen & visible(_rows_of(term, rows))
        if inputs.causal:
            queries = torch.arange(start, rows.stop, device=device) + inputs.query_offset
            seen = seen & (keys <= queries[:, None])
        counts += seen.sum(1)
    return counts


def scores_of(inputs: SoftmaxInputs, keys: Tensor, rows: Index, columns: Index) -> Tensor:
    """Scores before the softmax, −inf where masked: [heads, n queries, n keys].

    Args:
        inputs: the heads that `keys` belong to.
        keys: [kv_heads, n keys, d_head], promoted and centred: those that `columns` names.
        rows: query positions.
        columns: key positions.
    """
    q = inputs.q[:, rows].to(inputs.dtype) * inputs.scaling
    n = q.shape[1]
    grouped = q.reshape(keys.shape[0], -1, q.shape[-1])
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(inputs.heads, n, keys.shape[1])
    if inputs.softcap is not None:
        scores.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    for term in (inputs.bias, inputs.mask):
        if term is None:
            continue
        part = _rows_of(term, rows)[..., columns]
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, -torch.inf)
        else:
            scores += part.to(scores.dtype)
            scores.masked_fill_(part <= torch.finfo(part.dtype).min / 2, -torch.inf)
    if inputs.causal:
        _hide_future(scores, inputs, rows, columns)
    return scores


def _hide_future(scores: Tensor, inputs: SoftmaxInputs, rows: Index, columns: Index) -> None:
    device = scores.device
    queries = _positions(rows, device) + inputs.query_offset
    first = 0
    if isinstance(rows, slice) and isinstance(columns, slice):
        # All queries of the block see the keys before its first one: leave those alone.
        first = max(0, rows.start + inputs.query_offset + 1 - columns.start)
        if first >= scores.shape[-1]:
            return
    keys = _positions(columns, device)[first:]
    scores[..., first:].masked_fill_(keys > queries[:, None], -torch.inf)


def _positions(index: Index, device: torch.device) -> Tensor:
    if isinstance(index, slice):
        return torch.arange(index.start, index.stop, device=device)
    return index


def _kept(lse: Tensor, sinks: Tensor) -> Tensor:
    """The share of a row that its keys keep beside the sink: exp(lse) / (exp(lse) + exp(sink))."""
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])


def _finite(tensor: Tensor) -> Tensor:
    """The tensor with 0 for −inf, so that a row of −inf scores stays −inf when it is taken off."""
    return tensor.masked_fill(tensor == -torch.inf, 0)


def _heads_of(term: Tensor | None, heads: slice) -> Tensor | None:
    return term if term is None or term.shape[0] == 1 else term[heads]


def _rows_of(term: Tensor, rows: Index) -> Tensor:
    return term if term.shape[1] == 1 else term[:, rows]
