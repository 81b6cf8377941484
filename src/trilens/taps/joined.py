"""The recordings of several passes over one text, joined into one as if a single pass had read it.

Prefill reads the prompt, each decoding step one token more. What a layer gave for its tokens is put
end to end. Of a step's keys only the new ones are taken, whatever part of the text its cache holds:
the earlier ones are those of earlier passes, and what a query may see is said by one mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilens.caches.patterns.across import join_across
from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.softmax.masks import plain_mask, tensor_identity
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.caches.storage import address_of
from trilens.errors import AttentionPathError, GenerationError, RecurrentStateError
from trilens.io.short_memory import is_short_of_memory
from trilens.models.gates.decoding import join_calls
from trilens.models.gates.kernels import KernelRecord
from trilens.models.gates.recurrent_states import LayerState, states_of
from trilens.models.gates.site import GateSite
from trilens.taps.attention import pattern_of
from trilens.taps.attention_evidence import weights_evidence
from trilens.taps.recording import CaptureRequest, Recording
from trilens.taps.registry import AttentionCall

__all__ = [
    "OVER_PAIRS",
    "PassAttention",
    "PassRecord",
    "attention_of_pass",
    "cross_of_pass",
    "join_recordings",
]

OVER_PAIRS = ("attn.scores", "attn.pattern")
"""Sites over queries and keys: they are joined as the attention that they belong to."""


@dataclass(frozen=True, slots=True)
class PassAttention:
    """What one pass's attention call leaves behind for one layer: new keys alone.

    Shapes
        q [1, heads, seq, d], k [1, kv_heads, seq, d]: of the pass's tokens; mask and bias over the
        `seen` last tokens of the text so far, these among them.

    Attributes:
        form: of the first pass: its whole pattern, which says how the layer attends.
        weights: [1, heads, seq, seen] where no form gives them: a function's own, or changed by
            an edit.
    """

    q: Tensor
    k: Tensor
    seen: int
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    form: Pattern | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass of several.

    Attributes:
        start: tokens of the text before it.
        seq: its own.
        recording: what it left behind, without attention.
        attention: per layer.
        cross: per layer, its pattern over the source's positions.
    """

    start: int
    seq: int
    recording: Recording
    attention: Mapping[int, PassAttention]
    cross: Mapping[int, Pattern] = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        """What is kept of it by reference."""
        for attended in self.attention.values():
            yield from (attended.q, attended.k)
        for pattern in self.cross.values():
            yield from pattern.tensors().values()
        held = self.recording
        yield from held.residual.values()
        yield from (each for each in held.sites.values() if isinstance(each, Tensor))
        for calls in held.gates.values():
            yield from calls


def attention_of_pass(call: AttentionCall, seq: int, first: PassAttention | None) -> PassAttention:
    """What is kept of one attention call.

    Args:
        call: the call.
        seq: tokens of the pass.
        first: of the same layer in the first pass; None in that pass itself.

    Raises:
        AttentionPathError: a step attends in another way than the first pass, or its keys are not
            those of the text's last tokens.
    """
    if call.query.shape[-2] != seq or call.key.shape[-2] < seq:
        raise AttentionPathError(
            f"attention of {seq} tokens has {call.query.shape[-2]} queries and "
            f"{call.key.shape[-2]} keys: they are not the tokens; capture without attention=True"
        )
    form = pattern_of(call) if first is None else None
    if isinstance(form, SoftmaxPattern):
        held = form.tensors()
        return PassAttention(
            held["q"], held["k"][..., -seq:, :], held["k"].shape[-2], form.mask,
            held.get("bias"), form.causal, form,
        )  # fmt: skip
    # A cache hands out one tensor of all keys: a view would keep it alive, one more each step.
    new = call.key[..., -seq:, :].clone() if first is not None else call.key[..., -seq:, :]
    bias = call.options.get("position_bias")
    weights = None
    if not isinstance(form if first is None else first.form, SoftmaxPattern):
        weights = call.weights if call.weights is not None else pattern_of(call).dense()
    elif call.edited:
        weights = call.weights
    found = PassAttention(
        call.query, new, call.key.shape[-2], call.mask, bias, False, form, weights
    )
    if first is not None and weights is None and call.weights is not None:
        _check_form(found, call, first)
    return found


def cross_of_pass(call: AttentionCall, first: Pattern | None, layer: int) -> Pattern:
    """What is kept of one attention call to the source.

    Args:
        call: the call.
        first: of the same layer in the first pass; None in that pass itself.
        layer: its number.

    Raises:
        AttentionPathError: the source that a step sees is not the one that the first pass saw.
    """
    pattern = pattern_of(call)
    if not isinstance(pattern, SoftmaxPattern) or not isinstance(first, SoftmaxPattern):
        return pattern
    # Keys that each step computes anew would be kept once more with each.
    if address_of(pattern.k) == address_of(first.k):
        return pattern
    if not torch.equal(pattern.k, first.k):
        raise AttentionPathError(
            f"layer {layer} attends to another source in a decoding step than before it: capture "
            "the whole target with lens.capture"
        )
    return pattern.rebuild({**pattern.tensors(), "k": first.k}, pattern.params())


def _check_form(found: PassAttention, call: AttentionCall, first: PassAttention) -> None:
    """A step whose function returned its weights: the first pass's form has to give them back."""
    if not isinstance(first.form, SoftmaxPattern) or call.weights is None:
        return
    sinks = first.form.tensors().get("sinks")
    named = {"q": found.q, "k": call.key, "mask": found.mask, "bias": found.bias, "sinks": sinks}
    there = {name: tensor for name, tensor in named.items() if tensor is not None}
    pattern = first.form.rebuild(there, {**first.form.params(), "causal": False})
    # Functions that apply a sink to their output alone return the weights before it.
    without = {name: tensor for name, tensor in there.items() if name != "sinks"}
    forms = [pattern]
    if "sinks" in there:
        forms.append(first.form.rebuild(without, {**first.form.params(), "causal": False}))
    if not any(weights_evidence(each, call.weights).holds for each in forms):
        raise AttentionPathError(
            f"a decoding step of {type(call.module).__name__} attends in another way than the "
            "prompt did: load the model with attn_implementation='sdpa', or capture without "
            "attention=True"
        )


def join_recordings(passes: Sequence[PassRecord], request: CaptureRequest) -> Recording:
    """One recording of the whole text.

    Args:
        passes: in order, each beginning where the one before ended.
        request: of the whole text: one row.

    Raises:
        GenerationError: what the passes gave cannot be put end to end.
    """
    joined = Recording(request)
    first, last = passes[0].recording, passes[-1].recording
    joined.overwritten = any(each.recording.overwritten for each in passes)
    # Where the last token's alone are asked, earlier passes gave theirs away.
    logits = [each.recording.logits for each in passes if each.recording.logits is not None]
    joined.logits = _end_to_end(logits, 1, "logits") if logits else None
    for layer in last.residual:
        if request.residual == "last":
            joined.residual[layer] = last.residual[layer]
        else:
            parts = [each.recording.residual[layer] for each in passes]
            joined.residual[layer] = _end_to_end(parts, 1, f"resid_post of layer {layer}")
    for key in first.gates:
        values = [each.recording.gates[key] for each in passes]
        joined.gates[key] = _join_gates(values, request.gates[key], key)
    for place in first.sites:
        sites = [each.recording.sites[place] for each in passes]
        joined.sites[place] = _end_to_end(sites, 1, str(place))
    for layer in first.kernels:
        calls = join_calls([each.recording.kernels[layer] for each in passes], layer)
        if layer in request.states.layers:
            joined.states[layer] = [_states(call, request, layer) for call in calls]
        if layer in request.kernels:
            joined.kernels[layer] = calls
    joined.source = first.source
    _join_patterns(joined, passes)
    return joined


def _join_patterns(joined: Recording, passes: Sequence[PassRecord]) -> None:
    request, masks = joined.request, _Masks(passes)
    for layer in passes[0].cross:
        joined.crossed[layer] = join_across([each.cross[layer] for each in passes])
    for layer in passes[0].attention:
        pattern = _join_attention([each.attention[layer] for each in passes], masks, layer)
        if layer in request.attention:
            joined.patterns[layer] = pattern
        for name in OVER_PAIRS:
            if (name, layer) in request.sites:
                joined.sites[name, layer] = pattern


def _states(call: KernelRecord, request: CaptureRequest, layer: int) -> list[LayerState]:
    try:
        return states_of(
            call.function,
            call.arguments,
            call.result,
            positions=request.states.positions,
            lengths=request.lengths,
        )
    except RecurrentStateError as error:
        raise RecurrentStateError(f"layer {layer}: {error}") from error


def _join_gates(
    calls: Sequence[Sequence[Tensor]], site: GateSite, key: tuple[str, int]
) -> list[Tensor]:
    """The values of a gate, per call of a pass, along the axis of the tokens."""
    layout = site.layout
    if layout.form == "static":
        return list(calls[0])
    axis = layout.axis if layout.form in ("batched", "streams_first") else 0
    what = f"{key[0]} of layer {key[1]}"
    if len({len(each) for each in calls}) != 1:
        raise GenerationError(
            f"{what} has {len(calls[0])} values in the prompt's pass and another number in a "
            "step's: capture without gates=True"
        )
    return [_end_to_end(each, axis, what) for each in zip(*calls, strict=True)]


def _end_to_end(parts: Sequence[Any], axis: int, what: str) -> Tensor:
    if len(parts) == 1:
        return parts[0]  # type: ignore[no-any-return]
    try:
        return torch.cat(list(parts), dim=axis)
    except RuntimeError as cause:
        if is_short_of_memory(cause):
            raise
        raise GenerationError(
            f"{what} has the shapes {sorted({tuple(part.shape) for part in parts})} in the passes "
            "of one generation, which do not fit end to end: leave it out of the capture"
        ) from cause


class _Masks:
    """The mask of the whole text, made once for all layers whose passes share theirs."""

    def __init__(self, passes: Sequence[PassRecord]) -> None:
        self.places = [(each.start, each.seq) for each in passes]
        self.total = passes[-1].start + passes[-1].seq
        self.made: dict[object, tuple[Tensor | None, bool]] = {}

    def of(self, parts: Sequence[PassAttention]) -> tuple[Tensor | None, bool]:
        """The mask of a layer [1, 1 or heads, total, total], and whether it is causal besides."""
        key = tuple(
            (None if part.mask is None else tensor_identity(part.mask), part.causal, part.seen)
            for part in parts
        )
        if key not in self.made:
            self.made[key] = self._make(parts)
        return self.made[key]

    def _make(self, parts: Sequence[PassAttention]) -> tuple[Tensor | None, bool]:
        plain = [
            plain_mask(
                part.mask, seq_q=seq, seq_k=part.seen, causal=part.causal,
                query_offset=part.seen - seq,
            )
            for part, (_, seq) in zip(parts, self.places, strict=True)
        ]  # fmt: skip
        causal = [
            mask is None and (hides or seq == 1) and part.seen == start + seq
            for (mask, hides), part, (start, seq) in zip(plain, parts, self.places, strict=True)
        ]
        if all(causal):
            return None, True
        device = parts[0].q.device
        weighed = [m for m, _ in plain if m is not None and m.dtype != torch.bool]
        heads = max([1, *(m.shape[1] for m, _ in plain if m is not None)])
        shape = (1, heads, self.total, self.total)
        seen = torch.zeros(shape, dtype=torch.bool, device=device)
        weights = torch.zeros(shape, dtype=weighed[0].dtype, device=device) if weighed else None
        for (mask, hides), part, (start, seq) in zip(plain, parts, self.places, strict=True):
            end = start + seq
            place = (..., slice(start, end), slice(end - part.seen, end))
            free = torch.ones((seq, part.seen), dtype=torch.bool, device=device)
            if hides:
                free = free.tril(part.seen - seq)
            if mask is None or mask.dtype == torch.bool:
                seen[place] = free if mask is None else free & mask
                continue
            seen[place] = free & (mask > torch.finfo(mask.dtype).min / 2)
            if weights is not None:
                weights[place] = mask
        if weights is not None:
            return weights.masked_fill(~seen, torch.finfo(weights.dtype).min), False
        return plain_mask(seen, seq_q=self.total, seq_k=self.total, causal=False)


def _join_attention(parts: Sequence[PassAttention], masks: _Masks, layer: int) -> Pattern:
    form = parts[0].form
    if len(parts) == 1 and form is not None:
        return form
    if not isinstance(form, SoftmaxPattern):
        return DensePattern(_dense(parts, masks, layer, None))
    mask, causal = masks.of(parts)
    q = _end_to_end([part.q for part in parts], 2, f"queries of layer {layer}")
    k = _end_to_end([part.k for part in parts], 2, f"keys of layer {layer}")
    tensors = {**form.tensors(), "q": q, "k": k}
    tensors.pop("mask", None)
    if mask is not None:
        tensors["mask"] = mask
    if "bias" in tensors:
        tensors["bias"] = _bias(parts, masks)
    whole = form.rebuild(tensors, {**form.params(), "causal": causal})
    if all(part.weights is None for part in parts):
        return whole
    return DensePattern(_dense(parts, masks, layer, whole))


def _bias(parts: Sequence[PassAttention], masks: _Masks) -> Tensor:
    first = parts[0].bias
    if first is None:
        raise AttentionPathError("attention had a bias in the prompt's pass and none in a step's")
    whole = first.new_zeros((*first.shape[:2], masks.total, masks.total))
    for part, (start, seq) in zip(parts, masks.places, strict=True):
        if part.bias is not None:
            end = start + seq
            whole[..., start:end, end - part.seen : end] = part.bias
    return whole


def _dense(
    parts: Sequence[PassAttention], masks: _Masks, layer: int, whole: SoftmaxPattern | None
) -> Tensor:
    """The weights of all passes; of those that kept none, from what all of them attend by."""
    rows = []
    for part, (start, seq) in zip(parts, masks.places, strict=True):
        weights, end = part.weights, start + seq
        if weights is not None:
            rows.append(pad(weights, (end - part.seen, masks.total - end)))
        elif whole is not None:
            rows.append(whole.rows(range(start, end))[None])
    return _end_to_end(rows, 2, f"attention of layer {layer}")
