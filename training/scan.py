"""A selective scan that can be trained on a CPU.

transformers' own scan without a GPU kernel goes token by token through autograd: every one of its
steps makes gradients as large as the whole sequence. This one is the same sum with its derivative
written out, one channel at a time, so that a channel's states over the whole sequence stay in the
processor's cache and are computed again for the derivative instead of kept.

    h_t = exp(dt_t A) ⊙ h_{t−1} + (dt_t u_t) B_t        y_t = h_t · C_t

Only the training script uses it; a saved checkpoint is an ordinary Mamba.

Source: arXiv 2312.00752, equations 2 and 4, with the simplified discretization of its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.models.mamba import modeling_mamba

__all__ = ["selective_scan", "trainable_scan"]

Floats = np.ndarray[Any, Any]

_FAST = {"parallel": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "cache": True}
# exp(x) = 2^k · 2^f with f in [−½, ½]: the Taylor coefficients (ln 2)^i / i!, enough for 2e-7.
_E = tuple(np.float32(np.log(2) ** i / np.prod(np.arange(1, i + 1))) for i in range(1, 7))
_E1, _E2, _E3, _E4, _E5, _E6 = _E
_LOG2E = np.float32(1 / np.log(2))
_ONE, _HALF, _LOWEST = np.float32(1), np.float32(0.5), np.float32(-126)


@njit(inline="always", fastmath=True)  # type: ignore[untyped-decorator]
def _decays(step: float, rates: Floats, bits: Floats, powers: Floats, out: Floats) -> None:
    """out = exp(step · rates), step · rates ≤ 0; `bits` is `powers` seen as int32.

    The library's exp is a call per number; this one is plain arithmetic, eight numbers at once.
    """
    for n in range(len(rates)):
        x = max(step * rates[n] * _LOG2E, _LOWEST)
        k = np.int32(x - _HALF)  # cut towards zero: the nearest whole number, for x ≤ 0
        f = x - np.float32(k)
        bits[n] = (k + np.int32(127)) << np.int32(23)
        poly = _E4 + f * (_E5 + f * _E6)
        poly = _E1 + f * (_E2 + f * (_E3 + f * poly))
        out[n] = _ONE + f * poly
    for n in range(len(rates)):
        out[n] *= powers[n]


@njit(**_FAST)  # type: ignore[untyped-decorator]
def _scan_forward(u: Floats, dt: Floats, a: Floats, b: Floats, c: Floats, y: Floats) -> None:
    """u, dt, y [batch, inner, seq]; a [inner, state]; b, c [batch, seq, state]; all float32."""
    batch, inner, seq = u.shape
    state = a.shape[1]
    for job in prange(batch * inner):
        i, d = job // inner, job % inner
        bits = np.zeros(state, np.int32)
        powers = bits.view(np.float32)
        decay = np.empty(state, np.float32)
        h = np.zeros(state, np.float32)
        for t in range(seq):
            _decays(dt[i, d, t], a[d], bits, powers, decay)
            written = dt[i, d, t] * u[i, d, t]
            total = np.float32(0)
            for n in range(state):
                h[n] = decay[n] * h[n] + written * b[i, t, n]
                total += h[n] * c[i, t, n]
            y[i, d, t] = total


@njit(**_FAST)  # type: ignore[untyped-decorator]
def _scan_backward(
    u: Floats,
    dt: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    grad_y: Floats,
    grad_u: Floats,
    grad_dt: Floats,
    grad_a: Floats,
    grad_b: Floats,
    grad_c: Floats,
) -> None:
    """Gradients of `_scan_forward`; grad_a, grad_b, grad_c have one part per slice of channels.

    grad_u, grad_dt like u; grad_a [batch, inner, state]; grad_b, grad_c [slices, batch, seq,
    state], zero on entry: slices of channels add up apart, so that no two threads share a sum.
    """
    batch, inner, seq = u.shape
    state = a.shape[1]
    slices = len(grad_b)
    for job in prange(batch * slices):
        i, part = job // slices, job % slices
        bits = np.zeros(state, np.int32)
        powers = bits.view(np.float32)
        decays = np.empty((seq, state), np.float32)
        hs = np.zeros((seq + 1, state), np.float32)
        g = np.empty(state, np.float32)
        for d in range(part, inner, slices):
            for t in range(seq):
                _decays(dt[i, d, t], a[d], bits, powers, decays[t])
                written = dt[i, d, t] * u[i, d, t]
                for n in range(state):
                    hs[t + 1, n] = decays[t, n] * hs[t, n] + written * b[i, t, n]
            g[:] = 0
            for t in range(seq - 1, -1, -1):
                gy = grad_y[i, d, t]
                written = dt[i, d, t] * u[i, d, t]
                to_written = np.float32(0)
                to_step = np.float32(0)
                for n in range(state):
                    grad_c[part, i, t, n] += gy * hs[t + 1, n]
                    grad = g[n] + gy * c[i, t, n]
                    to_written += grad * b[i, t, n]
                    grad_b[part, i, t, n] += grad * written
                    grad *= decays[t, n]
                    g[n] = grad
                    exponent = grad * hs[t, n]
                    to_step += exponent * a[d, n]
                    grad_a[i, d, n] += exponent * dt[i, d, t]
                grad_u[i, d, t] = to_written * dt[i, d, t]
                grad_dt[i, d, t] = to_step + to_written * u[i, d, t]


class _Scan(torch.autograd.Function):
    """u, dt [batch, inner, seq]; a [inner, state]; b, c [batch, seq, state] → y like u."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        y = torch.empty_like(inputs[0])
        _scan_forward(*(tensor.detach().numpy() for tensor in inputs), y.numpy())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        u, dt, a, b, c = ctx.saved_tensors
        slices = min(8, u.shape[1])
        grads = (
            torch.empty_like(u),
            torch.empty_like(dt),
            a.new_zeros(len(u), *a.shape),
            b.new_zeros(slices, *b.shape),
            c.new_zeros(slices, *c.shape),
        )
        tensors = (u, dt, a, b, c, grad_y.contiguous(), *grads)
        _scan_backward(*(tensor.detach().numpy() for tensor in tensors))
        grad_u, grad_dt, grad_a, grad_b, grad_c = grads
        return grad_u, grad_dt, grad_a.sum(0), grad_b.sum(0), grad_c.sum(0)


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **unused: Any,
) -> Tensor:
    """Run Mamba's recurrence over a sequence from a zero state, like `mamba_selective_scan`.

    Shapes
        hidden_states, dt, z and the result [batch, inner, seq]; A [inner, state];
        B, C [batch, state, seq]; D, delta_bias [inner].

    Args:
        hidden_states: the recurrence's input u.
        dt: step sizes, before bias and softplus.
        A: decay rates, negative.
        B: what is written.
        C: what is read.
        D: skip weights.
        z: output gate before its silu.
        delta_bias: added to dt.
        delta_softplus: whether dt goes through a softplus.
        unused: switches between transformers' own ways of computing the same.
    """
    if delta_bias is not None:
        dt = dt + delta_bias[..., None]
    if delta_softplus:
        dt = functional.softplus(dt)
    channels = (hidden_states.contiguous(), dt.contiguous(), A.contiguous())
    tokens = (B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous())
    y: Tensor = _Scan.apply(*channels, *tokens)  # type: ignore[no-untyped-call]
    if D is not None:
        y = y + hidden_states * D[None, :, None]
    return y if z is None else y * functional.silu(z)


@contextmanager
def trainable_scan() -> Iterator[None]:
    """Let transformers' Mamba use :func:`selective_scan` for as long as the context lasts."""
    original = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = selective_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = original
