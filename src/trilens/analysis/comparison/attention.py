"""Attention patterns of two models on the same tokens: divergence, entropy, distance, sinks.

Both patterns are asked for the same blocks of rows, and every question is put to a block while it
is at hand: q and k are multiplied once per pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trilens.analysis.comparison.rows import Place, Row
from trilens.caches.patterns.protocol import Pattern
from trilens.errors import IncomparableError
from trilens.statistics.divergence import js_nats_of_rows

__all__ = ["EFFECTIVE", "SOFTMAX", "AttentionAccumulator"]

SOFTMAX = "attention"
EFFECTIVE = "effective_attention.relu_l1"
"""Recurrent layers, through the view that drops negative weights and scales rows to sum 1."""

_BLOCK_BYTES = 1 << 20
_MANY_BYTES = 32 << 20
_EFFECTIVE_ROWS = 32
_TWO_SIDED = ("entropy_nats", "distance_tokens", "first_token_mass", "sink_mass")


class AttentionAccumulator:
    """Takes both patterns of a layer, prompt by prompt.

    Every query of a softmax layer counts. A row of a recurrence costs as much as the whole prompt,
    so that of those at most 32 queries of each prompt count, evenly spread, the last among them.

    Memory:
        a few numbers per head and layer.
    """

    __slots__ = ("_modules", "_queries", "_sums")

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._queries: dict[int, int] = {}
        self._modules: dict[int, str] = {}

    def add(self, layer: int, module: str, before: Pattern, after: Pattern) -> None:
        """One prompt's patterns of one layer, neither of them signed.

        Args:
            layer: the model's own number.
            module: `SOFTMAX` or `EFFECTIVE`.
            before: of the model before.
            after: of the same tokens.

        Raises:
            IncomparableError: another number of heads or tokens.
        """
        shapes = [(p.heads, p.seq_q, p.seq_k) for p in (before, after)]
        if shapes[0] != shapes[1]:
            raise IncomparableError(
                f"attention of layer {layer} has [heads, seq_q, seq_k] {list(shapes[0])} before "
                f"and {list(shapes[1])} after: models of the same heads are needed"
            )
        recurrent = module == EFFECTIVE
        positions = _spread(before.seq_q) if recurrent else range(before.seq_q)
        total = torch.zeros(9, before.heads, dtype=torch.float64)
        for head, block in _blocks(before, positions):
            p, q = (pattern.rows(block, head).cpu() for pattern in (before, after))
            own = slice(None) if head is None else slice(head, head + 1)
            total[:, own] += _statistics(p, q, block, before.seq_k - before.seq_q)
        if not recurrent:
            for i, pattern in enumerate((before, after)):
                total[4 + 4 * i] = pattern.sink_mass().sum(-1, dtype=torch.float64).cpu()
        self._sums[layer] = self._sums.get(layer, torch.zeros_like(total)) + total
        self._queries[layer] = self._queries.get(layer, 0) + len(positions)
        self._modules[layer] = module

    def rows(self) -> list[Row]:
        """Per layer and head."""
        found = []
        for layer, total in sorted(self._sums.items()):
            module = self._modules[layer]
            means = (total / self._queries[layer]).tolist()
            for head in range(total.shape[1]):
                at = Place(module, layer, head)
                found.append(at.against_itself("js_nats", min(means[0][head], math.log(2.0))))
                for i, metric in enumerate(_TWO_SIDED, start=1):
                    if metric == "sink_mass" and module == EFFECTIVE:
                        continue
                    found.append(at.change(metric, means[i][head], means[i + 4][head]))
        return found


def _statistics(p: Tensor, q: Tensor, queries: Sequence[int], offset: int) -> Tensor:
    """Sums over the queries of a block, per head: float64 [9, heads].

    Divergence; then entropy, distance, weight on the first key and room for the sink, before and
    after.

    Shapes:
        p, q [heads, n, seq_k].
    """
    # Keys that come after the block's last query are hidden in a causal pattern: half the work.
    seen = queries[-1] + max(0, offset) + 1
    if seen < p.shape[-1] and not p[..., seen:].any() and not q[..., seen:].any():
        p, q = p[..., :seen], q[..., :seen]
    positions = torch.tensor(list(queries)) + max(0, offset)
    gaps = (positions[:, None] - torch.arange(p.shape[-1])).abs().to(p.dtype)
    sums = torch.zeros(9, p.shape[0], dtype=torch.float64)
    shares = []
    for i, weights in enumerate((p, q)):
        mass = weights.sum(-1, keepdim=True)
        # Already normalised rows stay as they are, bit for bit.
        whole = bool(((mass - 1).abs() < 1e-5).all())
        share = weights if whole else weights / mass.masked_fill(mass == 0, 1)
        shares.append(share)
        logs = share.clamp(min=torch.finfo(p.dtype).tiny).log_()
        sums[1 + 4 * i] = -logs.mul_(share).sum(-1).sum(-1, dtype=torch.float64)
        sums[2 + 4 * i] = (share * gaps).sum(-1).sum(-1, dtype=torch.float64)
        sums[3 + 4 * i] = weights[..., 0].sum(-1, dtype=torch.float64)
    sums[0] = js_nats_of_rows(shares[0], shares[1]).sum(-1, dtype=torch.float64)
    return sums


def _blocks(
    pattern: Pattern, positions: Sequence[int]
) -> Iterator[tuple[int | None, Sequence[int]]]:
    """A head (None for all at once) and query positions, a block of weights at a time."""
    row_bytes = 4 * pattern.seq_k
    heads: list[int | None] = [None]
    if row_bytes * pattern.heads > _MANY_BYTES:
        heads = list(range(pattern.heads))
    else:
        row_bytes *= pattern.heads
    step = max(1, _BLOCK_BYTES // row_bytes)
    for head in heads:
        for start in range(0, len(positions), step):
            yield head, positions[start : start + step]


def _spread(n: int) -> list[int]:
    """At most 32 of n positions, evenly, the last among them."""
    count = min(n, _EFFECTIVE_ROWS)
    return [(i + 1) * n // count - 1 for i in range(count)]
