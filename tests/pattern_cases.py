"""Patterns to ask, and a float64 reference that builds the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tolerances import sum_error
from trilens.caches.patterns.protocol import Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern

__all__ = [
    "CASES",
    "NATS",
    "WEIGHT",
    "Reference",
    "additive",
    "assert_matches",
    "build",
    "normal",
    "padding",
    "reference",
    "window",
    "zeros",
]

# Scores of these tests are sums of 16 products that add up to 20 at most, signs aside.
SCORE = float(sum_error(16, 20, torch.float32))
# The derivative of a weight by scores is p · (1 − p) at most.
WEIGHT = SCORE / 4
# An entropy weighs errors of scores by p · (s − mean s).
NATS = SCORE
# A mean distance weighs them by p and the distance from the mean one, up to 70 here; errors of
# both signs among the keys leave a tenth of it.
TOKENS = 7 * SCORE


@dataclass(frozen=True)
class Reference:
    weights: Tensor
    seen: Tensor
    lse: Tensor
    entropy: Tensor
    mean_distance: Tensor
    received: Tensor
    sink_mass: Tensor


def scores_of(
    q: Tensor, k: Tensor, scaling: float, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    repeated = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), repeated) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias.double()


def reference(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    query_offset: int = 0,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    **scoring: Any,
) -> Reference:
    """Everything about the pattern in float64, row by row as the definitions say it."""
    scores = scores_of(q, k, **scoring)
    _, heads, seq_q, seq_k = scores.shape
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.double()
        seen = seen & (mask > torch.finfo(mask.dtype).min / 2)
    i = torch.arange(seq_q)[:, None] + query_offset
    j = torch.arange(seq_k)[None]
    if causal:
        seen = seen & (j <= i)
    powers = torch.where(seen, scores, -torch.inf).exp()
    total = powers.sum(-1, keepdim=True)
    share = torch.where(total > 0, powers / total.clamp(min=1e-300), 0.0)
    sink = torch.zeros(heads, dtype=torch.float64)[None, :, None]
    if sinks is not None:
        sink = sinks.double().exp()[None, :, None]
    mass = total[..., 0] + sink
    sink_mass = torch.where(mass > 0, sink / mass.clamp(min=1e-300), 0.0)
    raw = share * (1 - sink_mass)[..., None]
    return Reference(
        weights=raw,
        seen=seen,
        lse=total[..., 0].log(),
        entropy=-torch.special.xlogy(share, share).sum(-1),
        mean_distance=(share * (i - j).abs()).sum(-1),
        received=raw.sum(2) / seen.sum(2).clamp(min=1),
        sink_mass=sink_mass,
    )


def normal(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros() -> Tensor:
    return torch.zeros(1, 4, 5, 8)


def window(seq: int, width: int) -> Tensor:
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None]
    return ((j <= i) & (j > i - width))[None, None]


def padding(seq: int, real: list[int]) -> Tensor:
    return (torch.arange(seq)[None] < torch.tensor(real)[:, None])[:, None, None]


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def some_rows_hidden(seq: int) -> Tensor:
    mask = window(seq, 12).clone()
    mask[..., 3, :] = False
    mask[..., 40:50, :] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "grouped query": {"causal": True, "kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "sliding window": {"mask": window(70, 9)},
    "sliding window with sinks, grouped": {
        "mask": window(70, 9),
        "sinks": normal(6, seed=5),
        "kv_heads": 3,
    },
    "additive mask": {"mask": additive(window(70, 70))},
    "additive mask in half precision": {"mask": additive(window(70, 70), torch.bfloat16)},
    "additive mask that also weighs": {
        "mask": additive(window(70, 30)) + normal(1, 1, 70, 70, seed=9)
    },
    "minus infinity": {"mask": additive(window(70, 70)).clamp(min=-1).log1p()},
    "padding": {"mask": padding(70, [70, 33]), "causal": True},
    "padding, per query": {"mask": padding(70, [12, 70]) & window(70, 20)},
    "mask per head": {"mask": normal(2, 6, 70, 70, seed=8) > -1, "causal": True},
    "softcap": {"causal": True, "softcap": 4.0},
    "softcap and window": {"mask": window(70, 9), "softcap": 4.0, "kv_heads": 2},
    "bias": {"bias": normal(1, 6, 70, 70, seed=7), "scaling": 1.0},
    "bias per prompt, softcap, causal": {
        "bias": normal(2, 1, 70, 70, seed=7),
        "softcap": 3.0,
        "causal": True,
    },
    "sinks": {"causal": True, "sinks": normal(6, seed=3)},
    "sinks, softcap": {"causal": True, "sinks": normal(6, seed=3), "softcap": 2.0},
    "cached keys": {"causal": True, "query_offset": 30, "seq_k": 100},
    "cached keys, window": {
        "mask": window(100, 9)[..., 30:, :],
        "query_offset": 30,
        "seq_k": 100,
    },
    "cross": {"seq_k": 41},
    "rows that see nothing": {"mask": some_rows_hidden(70), "sinks": None},
    "rows that see nothing, sinks": {"mask": some_rows_hidden(70), "sinks": normal(6, seed=3)},
    "more queries than keys": {"causal": True, "seq_k": 20},
    "one token": {"causal": True, "seq_q": 1, "seq_k": 1},
    "one query": {"seq_q": 1, "query_offset": 69, "causal": True},
    "negative scaling": {"causal": True, "scaling": -0.25},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[SoftmaxPattern, Reference]:
    case = dict(CASES[name])
    seq_q, seq_k = case.pop("seq_q", 70), case.pop("seq_k", 70)
    kv_heads = case.pop("kv_heads", 6)
    case.setdefault("scaling", 0.25)
    scale = 0.5 if case["scaling"] == 1.0 else 1.5
    q = normal(2, 6, seq_q, 16, seed=1, scale=scale).to(dtype)
    # A mean key that is not 0, so that centring has something to do.
    k = (normal(2, kv_heads, seq_k, 16, seed=2, scale=scale) + 0.5).to(dtype)
    return SoftmaxPattern(q, k, **case), reference(q, k, **case)


def assert_matches(pattern: Pattern, want: Reference, weight: float = WEIGHT) -> None:
    close = torch.testing.assert_close
    scale = weight / WEIGHT
    for batch in range(pattern.batch):
        rows = pattern.rows(range(pattern.seq_q), batch=batch)
        close(rows.double(), want.weights[batch], rtol=0, atol=weight)
        assert (rows[~want.seen[batch]] == 0).all()
        columns = pattern.columns(range(pattern.seq_k), batch=batch)
        close(columns.double(), want.weights[batch], rtol=0, atol=weight)
        assert (columns[~want.seen[batch]] == 0).all()
        close(pattern.entropy(batch).double(), want.entropy[batch], rtol=0, atol=NATS * scale)
        close(
            pattern.mean_distance(batch).double(),
            want.mean_distance[batch],
            rtol=0,
            atol=TOKENS * scale,
        )
        close(pattern.received(batch).double(), want.received[batch], rtol=0, atol=weight)
        close(pattern.sink_mass(batch).double(), want.sink_mass[batch], rtol=0, atol=weight)
    close(pattern.dense().double(), want.weights, rtol=0, atol=weight)
