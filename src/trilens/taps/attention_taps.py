"""What a pass does in attention calls: edges cut before the softmax, values edited and kept.

A cut edge is an entry of the mask, so that a row's other weights still sum to 1 and no [seq_q,
seq_k] tensor is made but the mask. An edit of attn.scores or attn.pattern builds that layer's
pattern, changes it and puts pattern · value in the place of the call's output.

Keys and values of earlier tokens come out of a cache as the model put them there: in a decoding
step they are edited again, at their own positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.errors import EditError
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.taps.attention import pattern_of
from trilens.taps.edit_knockouts import EdgeCut
from trilens.taps.edits import Compiled
from trilens.taps.registry import AttentionArguments, AttentionCall
from trilens.taps.site_taps import Pass, SiteTaps, Spot
from trilens.taps.span import Span

__all__ = ["AttentionTaps"]

_OVER_PAIRS = ("scores", "pattern")


class AttentionTaps:
    """The edits and records of a pass in its attention calls."""

    def __init__(self, run: Pass, edits: Compiled, taps: SiteTaps) -> None:
        self.run = run
        self.edits = edits
        self.taps = taps
        self.spots = [s for s in taps.spots if s.tap.event == "attention"]

    def modules(self, model: nn.Module, anatomy: Anatomy) -> set[nn.Module]:
        """The modules whose calls are edited or kept here."""
        layers = (layer for layer in self.edits.cuts if layer in anatomy.attention)
        paths = {path for layer in layers for path in anatomy.attends(layer)}
        return {model.get_submodule(path) for path in paths} | {s.tap.module for s in self.spots}

    def before(self, given: AttentionArguments) -> AttentionArguments:
        """What the function is called with instead; the same object where nothing changes."""
        query, key, value = self.query(given.query), self.key(given.key), self.value(given.value)
        if query is not given.query or key is not given.key or value is not given.value:
            given = replace(given, query=query, key=key, value=value)
        mask = self.mask(given)
        return given if mask is given.mask else replace(given, mask=mask)

    def query(self, tensor: Tensor) -> Tensor:
        """The queries that are used instead; the same object where nothing changes."""
        for spot in self._live("query"):
            tensor = self.taps.at(spot, tensor)
        return tensor

    def key(self, tensor: Tensor) -> Tensor:
        """The keys that are used instead."""
        for spot in self._live("key"):
            tensor = self._cached(spot, tensor)
        return tensor

    def value(self, tensor: Tensor) -> Tensor:
        """The values that are used instead."""
        for spot in self._live("value"):
            tensor = self._cached(spot, tensor)
        return tensor

    def mask(self, given: AttentionArguments) -> Any:
        """The mask that is used instead."""
        layer = self.run.layer
        if not self.run.mine() or layer is None:
            return given.mask
        for cut in self.edits.cuts.get(layer, ()):
            mask = self._cut(cut, given, self.run.span)
            given = given if mask is given.mask else replace(given, mask=mask)
        return given.mask

    def after(self, call: AttentionCall) -> AttentionCall:
        """The call with what it gives instead; the same object where nothing changes."""
        if not self.run.mine() or self.run.layer is None:
            return call
        for part in _OVER_PAIRS:
            for spot in self._live(part):
                call = self._over_pairs(spot, call)
        for spot in self._live("output"):
            if call.output is not None:
                output = self.taps.at(spot, call.output)
                call = call if output is call.output else replace(call, output=output)
        return call

    def _live(self, part: str) -> list[Spot]:
        if not self.run.mine():
            return []
        return [s for s in self.spots if s.site.layer == self.run.layer and s.tap.part == part]

    def _cached(self, spot: Spot, tensor: Tensor) -> Tensor:
        """Edit keys or values of all tokens so far; keep those of this pass."""
        span, seq_k = self.run.span, tensor.shape[-2]
        if seq_k == span.seq:
            return self.taps.at(spot, tensor)
        first = span.start + span.seq - seq_k
        whole = replace(span, start=first, seq=seq_k, lengths=(seq_k,) * len(span.lengths))
        tensor = self.taps.at(replace(spot, record=False), tensor, whole)
        if spot.record:
            self.taps.at(replace(spot, edit=False), tensor[..., -span.seq :, :])
        return tensor

    def _cut(self, cut: EdgeCut, given: AttentionArguments, span: Span) -> Any:
        """The mask with a knockout's edges hidden; as it was where it hides none in this pass."""
        edges = cut.edges(span)
        if edges is None:
            return given.mask
        hidden = torch.from_numpy(edges).to(given.query.device)[:, None]
        seq_k = given.key.shape[-2]
        if seq_k > hidden.shape[-1]:
            raise EditError(
                f"layer {cut.layer} has {seq_k} keys for {hidden.shape[-1]} tokens: which of them "
                "are the prompt's is not known, so that no edge of it can be cut"
            )
        hidden = hidden[..., -seq_k:]
        if cut.heads is not None:
            heads = torch.zeros(given.query.shape[1], dtype=torch.bool, device=hidden.device)
            heads[list(cut.heads)] = True
            hidden = hidden & heads[:, None, None]
        mask = _explicit_mask(given, cut.layer)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        # An edge to an earlier token that a window hides already is cut; one to a later is none.
        first = span.start + span.seq - seq_k
        past = torch.ones(span.seq, seq_k, dtype=torch.bool, device=hidden.device)
        past = past.tril(span.start - first)
        self.edits.touched.add(cut.number, cut.layer, int((hidden & (past | seen)).sum()))
        gone = hidden & seen
        if not bool(gone.any()):
            return given.mask
        _check_rest(gone, seen, cut, span)
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return torch.where(hidden, torch.finfo(mask.dtype).min, mask)

    def _over_pairs(self, spot: Spot, call: AttentionCall) -> AttentionCall:
        """Edit scores or weights of a call, and keep the call."""
        pattern = pattern_of(call)
        if spot.edit:
            scores = spot.tap.part == "scores"
            value = _scores(pattern) if scores else pattern.dense()
            new = self.edits.apply(spot.site.key, value, self.run.span)
            if new is not None:
                before, weights = value, new
                if scores:
                    before, weights = _softmaxed(value, pattern), _softmaxed(new, pattern)
                call = _with_weights(call, before, weights)
                pattern = DensePattern(weights.detach())
        if spot.record and self.run.gradients:
            return self._differentiable(spot, call)
        if spot.record:
            self.run.keep_pattern(spot.site.key, pattern)
        return call

    def _differentiable(self, spot: Spot, call: AttentionCall) -> AttentionCall:
        """Keep scores or weights that the output depends on.

        No kernel hands them on. What they give beside themselves, nothing, is added to its output:
        every bit of that stays, and its gradient is theirs too.
        """
        with torch.no_grad():
            pattern = pattern_of(call)
            value = _scores(pattern) if spot.tap.part == "scores" else pattern.dense()
        value = value.detach().requires_grad_()
        self.run.keep_site(spot.site.key, value)
        weights = _softmaxed(value, pattern) if spot.tap.part == "scores" else value
        return replace(_with_weights(call, weights.detach(), weights), weights=call.weights)


def _check_rest(gone: Tensor, seen: Tensor, cut: EdgeCut, span: Span) -> None:
    """Refuse a knockout that leaves a query none of the keys that it saw in this layer."""
    blind = gone.any(-1) & ~(seen & ~gone).any(-1)
    if bool(blind.any()):
        row, head, query = blind.nonzero()[0].tolist()
        rows = gone[row if len(gone) > 1 else 0, head if gone.shape[1] > 1 else 0, query]
        first = span.start + span.seq - gone.shape[-1]
        keys = listed([first + int(key) for key in rows.nonzero()[:, 0]], 12)
        raise EditError(
            f"edit {cut.number}: position {span.start + query} of prompt "
            f"{span.prompt_numbers[row]} would see no key at all in layer {cut.layer}: of "
            f"positions {keys}, which are all that this layer's mask shows it, leave one"
        )


def _explicit_mask(given: AttentionArguments, layer: int) -> Tensor:
    """The mask of a call as a tensor of its own: [1 or batch, 1 or heads, seq_q, seq_k]."""
    if isinstance(given.mask, Tensor) and given.mask.ndim == 4:
        return given.mask[..., : given.key.shape[-2]]
    fits = given.function is sdpa_attention_forward or given.implementation == "eager"
    if given.mask is not None or not fits:
        raise EditError(
            f"layer {layer} computes attention by {given.implementation!r}, which takes no mask "
            "that an edge could be cut in: load the model with attn_implementation='sdpa' or "
            "'eager'"
        )
    seq_q, seq_k = given.query.shape[-2], given.key.shape[-2]
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=given.query.device)
    if given.is_causal:
        # As PyTorch's own kernel: the first query sees the first key.
        seen = seen.tril()
    if given.function is sdpa_attention_forward:
        return seen[None, None]
    lowest = torch.finfo(given.query.dtype).min
    return torch.zeros_like(seen, dtype=given.query.dtype).masked_fill_(~seen, lowest)[None, None]


def _scores(pattern: Pattern) -> Tensor:
    if isinstance(pattern, SoftmaxPattern):
        return pattern.scores()
    raise EditError(
        "attn.scores cannot be edited here: the weights were read, not what they are made of; "
        "edit attn.pattern"
    )


def _softmaxed(scores: Tensor, pattern: Pattern) -> Tensor:
    """Weights of scores, a sink's share left out."""
    sinks = pattern.tensors().get("sinks")
    if sinks is None:
        return scores.softmax(-1).nan_to_num(0.0)
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _with_weights(call: AttentionCall, before: Tensor, weights: Tensor) -> AttentionCall:
    """The call with the output that other weights give.

    What changes is added to what the kernel gave, so that rows whose weights stay keep their bits.
    """
    output, value = call.output, call.value
    if output is None or value is None:
        raise EditError("attention gave no output and values that could be computed anew")
    groups = weights.shape[1] // value.shape[1]
    values = value[..., : weights.shape[-1], :].repeat_interleave(groups, dim=1)
    change = (weights - before) @ values.to(weights.dtype)
    new = output + change.transpose(1, 2).to(output.dtype)
    return replace(call, output=new, weights=weights, edited=True)
