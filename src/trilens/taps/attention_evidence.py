"""How well a candidate pattern explains what an attention function returned.

Both comparisons run over the same few rows of every head and prompt, in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.caches.patterns.protocol import Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.taps.registry import AttentionCall

__all__ = ["FEW", "Evidence", "output_error", "value_error", "weights_evidence"]

# So many rows average the rounding of half precision to where a small sink mass shows; the first
# ones have few keys, where a sink takes most.
_FIRST_ROWS = 8
_ROWS = 32
FEW = 5
"""Rows by which a pattern is checked whose every term was followed: each capture pays for them."""

_ALLOWED = 1e-5
_ALLOWED_EPS = 4


@dataclass(frozen=True, slots=True)
class Evidence:
    """A candidate held against the returned weights.

    Attributes:
        excess: the worst row's total variation from the returned row, over what is allowed.
        error: root of the mean squared difference of all compared weights.
    """

    excess: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the candidate gives back the weights."""
        return self.excess <= 1


def weights_evidence(pattern: SoftmaxPattern, weights: Tensor, few: int | None = None) -> Evidence:
    """The candidate against the returned weights [batch, heads, seq_q, seq_k].

    `few` compares so many rows alone, the last one among them.

    A row may be off by a total variation of 1e-5; in half precision by four roundings of 1 and, as
    the function may have rounded its scores, by what that does to the row: at most
    Σ w (1 − w) |δ|, with δ two roundings of the score.
    """
    excess, squares, count = 0.0, 0.0, 0
    for batch, rows, ours in _compared(pattern, few):
        theirs = weights[batch][:, rows].to(ours.dtype)
        if ours.shape != theirs.shape:
            return Evidence(math.inf, math.inf)
        # A row that may see nothing is uniform in eager attention and zero here.
        seen = ours.sum(-1) > 0
        if not bool(seen.any()):
            continue
        difference = (ours - theirs)[seen]
        allowed = _allowed(pattern, ours, batch, rows, weights.dtype)[seen]
        worst = float((difference.abs().sum(-1) / 2 / allowed).max())
        if math.isnan(worst):
            return Evidence(math.inf, math.inf)
        excess = max(excess, worst)
        squares += float(difference.double().square().sum())
        count += int((ours > 0).sum())
    return Evidence(excess, math.sqrt(squares / max(count, 1)))


def output_error(pattern: SoftmaxPattern, call: AttentionCall) -> float | None:
    """Root mean square of pattern · value − output over the compared rows; None without them."""
    value, output = call.value, call.output
    heads = pattern.heads
    if value is None or output is None or value.ndim != 4 or value.shape[2] != pattern.seq_k:
        return None
    shape = (pattern.batch, pattern.seq_q, heads, value.shape[-1])
    if tuple(output.shape) != shape or heads % value.shape[1]:
        return None
    squares, count = 0.0, 0
    for batch, rows, ours in _compared(pattern):
        values = value[batch].to(ours.dtype).repeat_interleave(heads // value.shape[1], dim=0)
        theirs = output[batch, rows].transpose(0, 1).to(ours.dtype)
        difference = (torch.bmm(ours, values) - theirs)[ours.sum(-1) > 0]
        squares += float(difference.double().square().sum())
        count += difference.numel()
    return math.sqrt(squares / max(count, 1))


def value_error(pattern: Pattern, call: AttentionCall) -> float | None:
    """Largest |pattern · value − output| over the largest pattern · |value|, in every row.

    None where the shapes are not those of heads and tokens.
    """
    value, output = call.value, call.output
    if value is None or output is None or value.ndim != 4 or output.ndim != 4:
        return None
    batch, kv_heads, seq_k, width = value.shape
    heads, seq_q = pattern.heads, pattern.seq_q
    if tuple(output.shape) != (batch, seq_q, heads, width) or heads % kv_heads:
        return None
    worst, largest = 0.0, 0.0
    for row in range(batch):
        weights = pattern.rows(range(seq_q), batch=row)
        if weights.shape[-1] > seq_k:
            return None
        values = value[row, :, : weights.shape[-1]].to(weights.dtype)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
        theirs = output[row].transpose(0, 1).to(weights.dtype)
        # A row that may see nothing is uniform in eager attention and zero here.
        seen = weights.sum(-1) > 0
        error = (torch.bmm(weights, values) - theirs)[seen]
        terms = torch.bmm(weights, values.abs())[seen]
        worst = max(worst, float(error.abs().max()) if error.numel() else 0.0)
        largest = max(largest, float(terms.max()) if terms.numel() else 0.0)
    return worst / largest if largest > 0 else None


def _compared(
    pattern: SoftmaxPattern, few: int | None = None
) -> Iterator[tuple[int, list[int], Tensor]]:
    rows = _rows(pattern.seq_q) if few is None else _spread(pattern.seq_q, few)
    for batch in range(pattern.batch):
        yield batch, rows, pattern.rows(rows, batch=batch)


def _rows(seq: int) -> list[int]:
    return sorted({*range(min(seq, _FIRST_ROWS)), *_spread(seq, _ROWS)})


def _spread(seq: int, count: int) -> list[int]:
    return sorted({step * (seq - 1) // (count - 1) for step in range(count)})


def _allowed(
    pattern: SoftmaxPattern, ours: Tensor, batch: int, rows: list[int], dtype: torch.dtype
) -> Tensor:
    """Total variation that rounding explains, per row: [heads, n]."""
    if dtype in (torch.float32, torch.float64):
        return ours.new_full(ours.shape[:2], _ALLOWED)
    # PROMOTE: half precision rounds a score of 20 by 0.06, the weight then by 6 %.
    eps = torch.finfo(dtype).eps
    group = pattern.heads // pattern.k.shape[1]
    queries = pattern.q[batch][:, rows].to(ours.dtype) * pattern.params()["scaling"]
    keys = pattern.k[batch].to(ours.dtype).repeat_interleave(group, dim=0)
    scores = torch.bmm(queries, keys.transpose(1, 2)).abs_()
    return eps * (_ALLOWED_EPS + (ours * (1 - ours) * scores).sum(-1))
