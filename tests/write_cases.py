"""Float64 references of recurrences, token by token, in which some tokens write nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["REFERENCES"]

Arguments = Mapping[str, Any]


def _scan(a: Arguments, cut: Tensor) -> Tensor:
    dt = F.softplus(a["dt"].double() + a["delta_bias"].double()[..., None])
    x, b = a["hidden_states"].double(), a["B"].double()
    h = x.new_zeros(*x.shape[:2], b.shape[1])
    for t in range(x.shape[2]):
        h = torch.exp(dt[..., t, None] * a["A"].double()) * h
        write = (dt[..., t] * x[..., t])[..., None] * b[:, None, :, t]
        h = torch.where(cut[:, t, None, None], h, h + write)
    return h


def _chunks(a: Arguments, cut: Tensor) -> Tensor:
    dt = F.softplus(a["dt"].double() + a["dt_bias"].double()).clamp(*a["dt_limit"])
    x = a["hidden_states"].double()
    b = a["B"].double().repeat_interleave(x.shape[2] // a["B"].shape[2], dim=2)
    s = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3])
    for t in range(x.shape[1]):
        s = torch.exp(dt[:, t] * a["A"].double())[..., None, None] * s
        write = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        s = torch.where(cut[:, t, None, None, None], s, s + write)
    return s


def _delta(a: Arguments, cut: Tensor) -> Tensor:
    k, v, g, beta = (a[name].double() for name in ("key", "value", "g", "beta"))
    if a["use_qk_l2norm_in_kernel"]:
        k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    k = k.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
    g = g[..., None] if g.dim() == 3 else g
    s = k.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    for t in range(k.shape[1]):
        s = torch.exp(g[:, t])[..., None] * s
        wrong = v[:, t] - (k[:, t, :, None] @ s)[:, :, 0]
        write = beta[:, t, :, None, None] * k[:, t, ..., None] * wrong[:, :, None]
        s = torch.where(cut[:, t, None, None, None], s, s + write)
    return s


def _rwkv7(a: Arguments, cut: Tensor) -> Tensor:
    w, k, v, read, back = (a[name].double() for name in ("log_w", "k", "v", "a", "b"))
    s = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    for t in range(k.shape[1]):
        kept = torch.exp(w[:, t])[..., None] * s
        removed = back[:, t, ..., None] * (read[:, t, :, None] @ s)
        whole = kept + removed + k[:, t, ..., None] * v[:, t, :, None]
        s = torch.where(cut[:, t, None, None, None], kept, whole)
    return s


def _rwkv(a: Arguments, cut: Tensor) -> Tensor:
    """The numerator, not divided by the exponential of its maximum."""
    k, v = a["key"].double(), a["value"].double()
    decay = torch.exp(-torch.exp(a["time_decay"].double()))
    n = torch.zeros_like(k[:, 0])
    for t in range(k.shape[1]):
        n = decay * n
        n = torch.where(cut[:, t, None], n, n + torch.exp(k[:, t]) * v[:, t])
    return n


def _unit(a: Arguments, cut: Tensor) -> Tensor:
    unit, x = a["module"], a["activations"].double()
    batch, seq, width = x.shape
    heads = x.view(batch, seq, unit.num_attention_heads, -1)

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        made = torch.einsum("bthi,hij->bthj", heads, weight.double()) + bias.double()
        return torch.sigmoid(made.reshape(batch, seq, width))

    enter = gate(unit.input_gate_weight, unit.input_gate_bias)
    recur = gate(unit.recurrent_gate_weight, unit.recurrent_gate_bias)
    log = -8 * recur * F.softplus(unit.recurrent_param.double())
    first = (a["position_ids"] == 0)[..., None]
    write = enter * x * torch.where(first, 1.0, torch.sqrt(1 - torch.exp(2 * log)))
    decay = torch.where(first, 0.0, torch.exp(log))
    h = torch.zeros_like(x[:, 0])
    for t in range(seq):
        h = decay[:, t] * h
        h = torch.where(cut[:, t, None], h, h + write[:, t])
    return h


def _mlstm(a: Arguments, cut: Tensor) -> Tensor:
    """The matrix, not divided by the exponential of its maximum."""
    k, v, i, f = (a[name].double() for name in ("key", "value", "igate", "fgate"))
    c = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    for t in range(k.shape[2]):
        c = torch.sigmoid(f[..., t])[..., None, None] * c
        write = torch.exp(i[..., t])[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        c = torch.where(cut[:, t, None, None, None], c, c + write)
    return c


def _lightning(a: Arguments, cut: Tensor) -> Tensor:
    slope = a["module"].slope_rate.double().reshape(1, -1, 1, 1)
    batch, seq, width = a["output"].shape
    heads = slope.shape[1]
    _, k, v = a["output"].double().view(batch, seq, heads, 3, width // heads // 3).unbind(3)
    s = k.new_zeros(batch, heads, k.shape[-1], v.shape[-1])
    for t in range(seq):
        s = torch.exp(-slope) * s
        s = torch.where(cut[:, t, None, None, None], s, s + k[:, t, ..., None] * v[:, t, :, None])
    return s


REFERENCES: Mapping[str, Callable[[Arguments, Tensor], Tensor]] = {
    "mamba_selective_scan": _scan,
    "mamba2_chunk_scan": _chunks,
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "rwkv7_attention": _rwkv7,
    "rwkv_linear_attention": _rwkv,
    "rg_lru": _unit,
    "mlstm": _mlstm,
    "lightning_attention": _lightning,
}
"""Recurrence → its state after the last token, from arguments and tokens [batch, seq]."""
