"""The RWKV-7 recurrence: one token at a time, and chunks of tokens at once.

    S_t = (diag(w_t) + b_t a_tᵀ) S_{t−1} + k_t v_tᵀ        y_t = S_tᵀ r_t

with the decay w = exp(log_w), a = −κ and b = κ ⊙ (in-context learning rate), κ the normalised
removal key. Rows of S are key channels, columns value channels.

Within a chunk the vectors u_t = S_{t−1}ᵀ a_t solve a unit lower triangular system, so a whole chunk
becomes a few matrix products. Only the state at the chunk's start is passed on one by one.

Source: arXiv 2503.14456; the chunked form of delta rules is arXiv 2406.06484.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilens.errors import ShapeError, ValueRangeError

__all__ = ["rwkv7_attention", "rwkv7_recurrent"]

# Cumulative log decay that one chunk may span. A chunk multiplies factors of up to exp(±10) around
# its middle: far from overflow, and the rounding of the sum itself, 10 · 6e-8, stays below 1e-6.
_LOG_SPAN = 20.0


def rwkv7_attention(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence: the one kernel boundary of the model.

    Everything recurrent passes here, so whoever wants the inner values (effective attention, decay,
    removal and replacement keys) replaces this name where it is called.

    Shapes
        r, log_w, k, v, a, b [batch, seq, heads, d_head]; state [batch, heads, d_head, d_head];
        y like r.

    Args:
        r: receptance, the query.
        log_w: log of the decay, ≤ 0; RWKV-7's own lies in (−e^−½, 0). Minus infinity forgets.
        k: replacement key.
        v: value.
        a: −κ, what the state is read with before it is changed.
        b: κ ⊙ in-context learning rate, where that reading is added back.
        state: S before the first token, zero unless given.
        chunk_size: tokens taken at once. A steeper decay than RWKV-7's shortens the chunks until
            nothing can overflow, down to one token.

    Returns:
        y in r's dtype and the state after the last token. The state is float32 (float64 where any
        input is), because it sums over the whole past.

    Raises:
        ShapeError: inputs without one common shape or any token, or a state that does not fit.
        ValueRangeError: a chunk_size below 1.

    Memory: about 30 tensors of r's size in float32, and [d_head, d_head] per chunk and head.
    """
    _check(r, (log_w, k, v, a, b), state, chunk_size)
    work = torch.float32
    for tensor in (r, log_w, k, v, a, b):
        work = torch.promote_types(work, tensor.dtype)
    # PROMOTE: the state sums over the whole past; bf16 would drop what a token adds to it.
    inputs = _Inputs(*(tensor.to(work).transpose(1, 2) for tensor in (r, log_w, k, v, a, b)))
    # PROMOTE: autocast would run these products in half precision again.
    with torch.autocast(device_type=r.device.type, enabled=False):
        start = inputs.zero_state() if state is None else state.to(work)
        chunk = _safe_chunk(inputs.log_w, chunk_size)
        y, end = _chunked(inputs, start, chunk) if chunk > 1 else _stepwise(inputs, start)
    return y.transpose(1, 2).to(r.dtype), end


rwkv7_recurrent = partial(rwkv7_attention, chunk_size=1)
"""The same recurrence, token by token: the definition, and the reference for the chunks."""


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The six inputs of the recurrence as [batch, heads, seq, d_head] in one dtype."""

    r: Tensor
    log_w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor

    def zero_state(self) -> Tensor:
        batch, heads, _, d_head = self.r.shape
        return self.r.new_zeros(batch, heads, d_head, d_head)


def _check(r: Tensor, others: tuple[Tensor, ...], state: Tensor | None, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueRangeError(f"chunk_size is {chunk_size}: it must be at least 1")
    if r.dim() != 4 or r.shape[1] == 0:
        raise ShapeError(
            f"r has shape {tuple(r.shape)}: the recurrence takes [batch, seq, heads, d_head] with "
            "at least one token"
        )
    for name, tensor in zip(("log_w", "k", "v", "a", "b"), others, strict=True):
        if tensor.shape != r.shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: r has {tuple(r.shape)}")
    expected = (r.shape[0], r.shape[2], r.shape[3], r.shape[3])
    if state is not None and tuple(state.shape) != expected:
        raise ShapeError(f"state has shape {tuple(state.shape)}: these inputs need {expected}")


def _safe_chunk(log_w: Tensor, chunk_size: int) -> int:
    """The longest chunk up to chunk_size whose decay spans at most `_LOG_SPAN`."""
    chunk = min(chunk_size, log_w.shape[2])
    if chunk == 1:
        return 1
    steepest = -float(log_w.detach().amin())
    if steepest <= 0 or math.isnan(steepest):
        return chunk
    return max(1, min(chunk, int(_LOG_SPAN / steepest)))


def _stepwise(x: _Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: two outer products and one decay per token."""
    w = x.log_w.exp()
    outputs = []
    for t in range(x.r.shape[2]):
        read = x.a[:, :, t].unsqueeze(-2) @ state
        state = (
            w[:, :, t].unsqueeze(-1) * state
            + x.b[:, :, t].unsqueeze(-1) * read
            + x.k[:, :, t].unsqueeze(-1) * x.v[:, :, t].unsqueeze(-2)
        )
        outputs.append(x.r[:, :, t].unsqueeze(-2) @ state)
    return torch.cat(outputs, dim=-2), state


def _chunked(x: _Inputs, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; padding tokens at the end (w = 1, all else 0) leave the state alone.

    With c the cumulative log decay inside a chunk, P = exp(c), and the state S at its start:
        u_t = (P_{t−1} ⊙ a_t)ᵀ S + Σ_{s<t} (aᵀ_t P_{t−1}/P_s b_s) u_s + (aᵀ_t P_{t−1}/P_s k_s) v_s
        y_t = (P_t ⊙ r_t)ᵀ S + Σ_{s≤t} (rᵀ_t P_t/P_s b_s) u_s + (rᵀ_t P_t/P_s k_s) v_s
    """
    batch, heads, seq, d_head = x.r.shape
    fill = -seq % chunk
    r, log_w, k, v, a, b = (
        pad(tensor, (0, 0, 0, fill)).reshape(batch, heads, -1, chunk, d_head)
        for tensor in (x.r, x.log_w, x.k, x.v, x.a, x.b)
    )
    cumulative = log_w.cumsum(dim=-2)
    before = pad(cumulative, (0, 0, 1, -1))
    total = cumulative[..., -1:, :]
    # Ratios P_t/P_s are split around the chunk's middle, which halves the exponents on either side.
    middle = cumulative[..., chunk // 2, :].unsqueeze(-2)
    readers = torch.cat([a * (before - middle).exp(), r * (cumulative - middle).exp()], dim=-2)
    writers = torch.cat([b, k], dim=-2) * (middle - cumulative).exp().repeat(1, 1, 1, 2, 1)
    scores = readers @ writers.transpose(-1, -2)
    a_to_b = scores[..., :chunk, :chunk].tril(-1)
    a_to_k = scores[..., :chunk, chunk:].tril(-1)
    r_to_bk = scores[..., chunk:, :] * _causal_twice(chunk, scores)

    known = torch.cat([a * before.exp(), a_to_k @ v], dim=-1)
    # The diagonal of the system is 1 by construction, so only −a_to_b is handed over.
    solved = torch.linalg.solve_triangular(-a_to_b, known, upper=False, unitriangular=True)
    from_state, from_chunk = solved.split(d_head, dim=-1)
    to_end = (total - cumulative).exp()
    writes = torch.cat([b * to_end, k * to_end], dim=-2).transpose(-1, -2)
    keep = total.exp().transpose(-1, -2)

    starts, values = [], []
    for n in range(r.shape[2]):
        starts.append(state)
        read = from_chunk[:, :, n] + from_state[:, :, n] @ state
        values.append(torch.cat([read, v[:, :, n]], dim=-2))
        state = keep[:, :, n] * state + writes[:, :, n] @ values[-1]
    y = (r * cumulative.exp()) @ torch.stack(starts, dim=2) + r_to_bk @ torch.stack(values, dim=2)
    return y.reshape(batch, heads, -1, d_head)[:, :, :seq], state


def _causal_twice(chunk: int, like: Tensor) -> Tensor:
    """Lower triangles of ones, side by side: [chunk, 2 · chunk]."""
    return like.new_ones(chunk, chunk).tril().repeat(1, 2)
