"""From what an attention function was called with to a pattern that can be asked.

What SDPA computes is fixed by its arguments. Any other function ("eager": the model file's own)
returned its weights: the lazy form is claimed only where it gives back some of those weights, and
the weights themselves are kept where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.errors import AttentionPathError
from trilens.taps.registry import AttentionCall

__all__ = ["is_readable", "pattern_of"]


def is_readable(call: AttentionCall) -> bool:
    """Whether `pattern_of` has something to read a pattern from."""
    return call.function is sdpa_attention_forward or call.weights is not None


def pattern_of(call: AttentionCall) -> Pattern:
    """The attention pattern of one call.

    Raises:
        AttentionPathError: the implementation neither is SDPA nor returns its weights.
    """
    if call.function is sdpa_attention_forward:
        return _sdpa_pattern(call)
    if call.weights is None:
        raise AttentionPathError(
            f"attention implementation {call.implementation!r} gives neither weights nor arguments "
            "that can be read; load the model with attn_implementation='sdpa' or 'eager'"
        )
    rows = _some_rows(call.query.shape[-2])
    tolerance = _tolerance(call.weights.dtype)
    for pattern in _eager_candidates(call):
        difference = _difference(pattern, call.weights, rows)
        if difference <= tolerance:
            return pattern
    return DensePattern(call.weights.detach())


def _sdpa_pattern(call: AttentionCall) -> SoftmaxPattern:
    seq_q, seq_k = call.query.shape[-2], call.key.shape[-2]
    is_causal = call.options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(call.module, "is_causal", True)
    causal = bool(is_causal) and call.mask is None and seq_q > 1
    key = call.key[..., :seq_q, :] if causal and seq_k > seq_q else call.key
    return SoftmaxPattern(
        call.query,
        key,
        scaling=_scaling(call),
        mask=call.mask,
        causal=causal,
        bias=call.options.get("position_bias"),
    )


def _eager_candidates(call: AttentionCall) -> Iterator[SoftmaxPattern]:
    """The forms in which transformers' own eager functions compute attention."""
    softcap = call.options.get("softcap")
    for sinks in (None, *_sink_tensors(call)):
        for cap in dict.fromkeys((softcap, None)):
            yield SoftmaxPattern(
                call.query,
                call.key,
                scaling=_scaling(call),
                mask=call.mask,
                bias=call.options.get("position_bias"),
                softcap=cap,
                sinks=sinks,
            )


def _scaling(call: AttentionCall) -> float:
    scaling = call.options.get("scaling")
    if scaling is None:
        scaling = getattr(call.module, "scaling", None)
    return call.query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _sink_tensors(call: AttentionCall) -> Iterator[Tensor]:
    """Whatever could be a sink logit per head: among the arguments, or the module's own."""
    heads = call.query.shape[1]
    own: dict[str, Any] = dict(call.module.named_parameters(recurse=False))
    for value in (*call.options.values(), *own.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == heads:
            yield value.detach().reshape(heads)


def _some_rows(seq: int) -> list[int]:
    return sorted({0, seq // 3, seq // 2, seq - 1})


def _tolerance(dtype: torch.dtype) -> float:
    # PROMOTE: weights rounded to half precision can't agree to better than their own rounding.
    return 1e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps


def _difference(pattern: SoftmaxPattern, weights: Tensor, rows: list[int]) -> float:
    worst = 0.0
    for batch in range(weights.shape[0]):
        ours = pattern.rows(rows, batch=batch)
        theirs = weights[batch][:, rows].to(ours.dtype)
        if ours.shape != theirs.shape:
            return float("inf")
        # A row that may see nothing is uniform in eager attention and zero here.
        seen = ours.sum(-1) > 0
        worst = max(worst, float((ours - theirs)[seen].abs().max()) if bool(seen.any()) else 0.0)
    return worst
