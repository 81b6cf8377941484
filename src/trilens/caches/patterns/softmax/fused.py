"""The fast way to a pattern's log-sum-exp and entropy: one fused attention pass with v = k.

With s = scaling · q·k and p = softmax(s) the entropy of a row is

    H = lse − Σ p s = lse − scaling · q · (Σ p k)

and Σ p k is what attention gives when the keys stand in for the values. PyTorch's CPU flash kernel
returns that together with lse, skips what is causal, and keeps nothing of size [seq_q, seq_k].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilens.caches.patterns.softmax.blocks import (
    SoftmaxInputs,
    Summary,
    head_groups,
    row_blocks,
    spans,
    summarise_block,
)

__all__ = ["ENTROPY_ERROR_NATS", "fits_fused", "summarise", "summarise_blocks", "summarise_fused"]

#: Rows whose entropy the fused way might miss by more than about this are computed from scores.
ENTROPY_ERROR_NATS = 2e-5

# A private operator, there since torch 2.2; without it everything runs block by block.
_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def fits_fused(inputs: SoftmaxInputs) -> bool:
    """Whether the fused pass computes exactly these scores: plain causal or full, on the CPU."""
    return (
        _FLASH is not None
        and inputs.q.device.type == "cpu"
        and inputs.softcap is None
        and inputs.mask is None
        and inputs.bias is None
        # The kernel's causal mask starts at the first key.
        and not (inputs.causal and inputs.query_offset)
    )


def summarise(inputs: SoftmaxInputs) -> Summary:
    """Log-sum-exp and entropy of every query position, by the fastest way that fits."""
    return summarise_fused(inputs) if fits_fused(inputs) else summarise_blocks(inputs)


def summarise_blocks(inputs: SoftmaxInputs, wanted: Tensor | None = None) -> Summary:
    """Log-sum-exp and entropy from the scores themselves, block by block; always possible.

    Args:
        inputs: one prompt.
        wanted: [heads, seq_q] bool; blocks without a wanted row are left empty.
    """
    out = _empty(inputs)
    step, groups = row_blocks(inputs)
    walk = spans(inputs, step)
    for group in groups:
        for rows, columns in walk:
            if wanted is not None and not wanted[group.heads, rows].any():
                continue
            block = summarise_block(group, rows, columns)
            out.lse[group.heads, rows] = block.lse
            out.entropy[group.heads, rows] = block.entropy
    return out


def summarise_fused(inputs: SoftmaxInputs) -> Summary:
    """Log-sum-exp and entropy by fused passes; `fits_fused` has to hold.

    Rows where the difference of two large numbers could cost digits are computed from scores.
    """
    out = _empty(inputs)
    doubtful = torch.zeros(inputs.heads, inputs.seq_q, dtype=torch.bool)
    # Keys and, for one query head per key head, q and Σ p k are alive at once.
    size = inputs.q.shape[-1] * inputs.dtype.itemsize * max(inputs.seq_k, inputs.seq_q)
    for group in head_groups(inputs, size):
        keys = group.keys[None]
        for nth in range(inputs.group):
            heads = slice(group.heads.start + nth, group.heads.stop, inputs.group)
            q = inputs.q[heads].to(inputs.dtype)
            mean_key, lse = _FLASH(q[None], keys, keys, 0.0, inputs.causal, scale=inputs.scaling)
            terms = mean_key[0].mul_(q)
            out.lse[heads] = lse[0]
            out.entropy[heads] = (lse[0] - terms.sum(-1).mul_(inputs.scaling)).clamp_(min=0)
            size_of_terms = terms.abs_().sum(-1).mul_(abs(inputs.scaling)) + lse[0].abs()
            error = size_of_terms * torch.finfo(inputs.dtype).eps
            doubtful[heads] = ~(error <= ENTROPY_ERROR_NATS)
    if doubtful.any():
        exact = summarise_blocks(inputs, doubtful)
        out.entropy[doubtful] = exact.entropy[doubtful]
        out.lse[doubtful] = exact.lse[doubtful]
    return out


def _empty(inputs: SoftmaxInputs) -> Summary:
    empty = torch.empty(inputs.heads, inputs.seq_q, dtype=inputs.dtype, device=inputs.q.device)
    return Summary(empty, torch.empty_like(empty))
