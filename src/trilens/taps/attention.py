"""From what an attention function was called with to a pattern that can be asked.

What SDPA computes is fixed by its arguments. Any other function ("eager": the model file's own)
returned its weights: of the lazy forms that give back some of those weights the nearest is claimed,
and the weights themselves are kept where none does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.errors import AttentionPathError
from trilens.taps.attention_evidence import FEW, output_error, weights_evidence
from trilens.taps.inline.follower import inline_attention
from trilens.taps.registry import AttentionCall

__all__ = ["is_readable", "pattern_of", "settled"]


def is_readable(call: AttentionCall) -> bool:
    """Whether `pattern_of` has something to read a pattern from."""
    fused = call.function is sdpa_attention_forward
    return fused or call.weights is not None or call.proven


_SINK_NAME = re.compile("sink|^s_aux$")

# A module that has sinks uses them: rounding alone must not speak against that, nor for a tensor
# that only has a sink's shape.
_DOUBT_NO_SINK = 2.0
_DOUBT_OTHER_SINK = 4.0


def pattern_of(call: AttentionCall) -> Pattern:
    """The attention pattern of one call.

    Raises:
        AttentionPathError: the implementation neither is SDPA nor returns its weights.
    """
    if call.edited and call.weights is not None:
        return DensePattern(call.weights.detach())
    if call.function is sdpa_attention_forward:
        return _sdpa_pattern(call)
    if call.proven or call.function is inline_attention:
        return _inline_pattern(call)
    if call.weights is None:
        raise AttentionPathError(
            f"attention implementation {call.implementation!r} gives neither weights nor arguments "
            "that can be read; load the model with attn_implementation='sdpa' or 'eager'"
        )
    best = _best_of(_eager_candidates(call), call.weights)
    if best is None:
        return DensePattern(call.weights.detach())
    return _with_later_sink(best, call)


def settled(call: AttentionCall) -> AttentionCall:
    """A call that a capture keeps: without weights where its arguments give them back."""
    if call.function is not inline_attention or call.proven or call.edited:
        return call
    if isinstance(_inline_pattern(call), SoftmaxPattern):
        return replace(call, weights=None, value=None, output=None, proven=True)
    return replace(call, value=None, output=None)


@torch.no_grad()
def _inline_pattern(call: AttentionCall) -> Pattern:
    """The pattern of a module's own code: every term of its scores was followed, or none is."""
    if "opaque" in call.options:
        if call.weights is None:
            raise AttentionPathError("attention in a module's own code gave no weights")
        return DensePattern(call.weights.detach())
    pattern = SoftmaxPattern(
        call.query,
        call.key,
        scaling=_scaling(call),
        mask=call.mask,
        causal=bool(call.options.get("is_causal")),
        bias=call.options.get("position_bias"),
    )
    if call.weights is None or weights_evidence(pattern, call.weights, FEW).holds:
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


def _best_of(candidates: Iterable[_Candidate], weights: Tensor) -> SoftmaxPattern | None:
    """Of the candidates that give back the weights, the one that misses them by least."""
    best, least = None, math.inf
    for candidate in candidates:
        evidence = weights_evidence(candidate.pattern, weights)
        error = evidence.error * candidate.doubt
        if evidence.holds and (best is None or error < least):
            best, least = candidate.pattern, error
    return best


def _with_later_sink(pattern: SoftmaxPattern, call: AttentionCall) -> SoftmaxPattern:
    """The pattern with the module's sinks, where the function applied them to its output alone.

    Such a function returns the weights before the sink took its share; what the model goes on with
    is the output.
    """
    without = output_error(pattern, call)
    if "sinks" in pattern.tensors() or without is None:
        return pattern
    best, least = pattern, without * _DOUBT_NO_SINK
    for sinks in _sinks(call, named=True):
        candidate = pattern.rebuild({**pattern.tensors(), "sinks": sinks}, pattern.params())
        error = output_error(candidate, call)
        if error is not None and error < least:
            best, least = candidate, error
    return best


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A form that attention may have; its error counts times the doubt."""

    pattern: SoftmaxPattern
    doubt: float


def _eager_candidates(call: AttentionCall) -> Iterator[_Candidate]:
    """The forms in which transformers' own eager functions compute attention, likely ones first."""
    softcap = call.options.get("softcap")
    sinks: list[tuple[float, Tensor | None]] = [(1.0, each) for each in _sinks(call, named=True)]
    sinks += [(_DOUBT_NO_SINK, None)]
    sinks += [(_DOUBT_OTHER_SINK, each) for each in _sinks(call, named=False)]
    for doubt, sink in sinks:
        for cap in dict.fromkeys((softcap, None)):
            pattern = SoftmaxPattern(
                call.query,
                call.key,
                scaling=_scaling(call),
                mask=call.mask,
                bias=call.options.get("position_bias"),
                softcap=cap,
                sinks=sink,
            )
            yield _Candidate(pattern, doubt)


def _scaling(call: AttentionCall) -> float:
    scaling = call.options.get("scaling")
    if scaling is None:
        scaling = getattr(call.module, "scaling", None)
    return call.query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _sinks(call: AttentionCall, *, named: bool) -> list[Tensor]:
    """What could be a sink logit per head, the module's own first; by its name, or by shape."""
    heads = call.query.shape[1]
    found: dict[int, Tensor] = {}
    for name, value in (*call.module.named_parameters(recurse=False), *call.options.items()):
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == heads
        if fits and named == bool(_SINK_NAME.search(name)):
            found.setdefault(value.data_ptr(), value.detach().reshape(heads))
    return list(found.values())
