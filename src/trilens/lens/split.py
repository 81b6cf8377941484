"""From one padded batch to one capture per prompt: no pad in any tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.cross_attention import CrossAttentionCache
from trilens.caches.derived import Derived, HeadOut, PatternValue
from trilens.caches.gates import GateCache
from trilens.caches.patterns.across import unpad_across
from trilens.caches.patterns.parts import PartsPattern
from trilens.caches.patterns.protocol import Pattern
from trilens.caches.patterns.softmax.masks import SharedMasks
from trilens.caches.sites import SiteCache
from trilens.caches.states import StateCache
from trilens.lens.capture import Capture
from trilens.lens.parts import ModelInfo, Parts
from trilens.models.batched_arguments import source_lengths
from trilens.models.gates.recurrent_states import LayerState, join_states
from trilens.models.gates.site import rows_of
from trilens.models.sites.head_out import projection_weight
from trilens.models.sites.site import SiteKey
from trilens.models.tokens import Prompt
from trilens.taps.attention import pattern_of
from trilens.taps.recording import CaptureRequest, Recording
from trilens.text.source import Source, frames, place_name

__all__ = ["split"]


def split(
    prompts: Sequence[Prompt],
    recording: Recording,
    effective: Mapping[int, Pattern],
    *,
    logits: str | None,
    info: ModelInfo,
) -> list[Capture]:
    """One capture per row. A single row keeps references; rows of a batch are copied out of it.

    Args:
        prompts: one per row of the batch.
        recording: what the pass left behind.
        effective: patterns of recurrent layers, over the padded batch.
        logits: "all", "last" or None.
        info: what a capture says of its model.
    """
    softmax: dict[int, Pattern] = {**recording.patterns}
    softmax |= {layer: pattern_of(call) for layer, call in recording.attention.items()}
    softmax |= {
        layer: PartsPattern({name: pattern_of(call) for name, call in calls.items()})
        for layer, calls in recording.parts.items()
    }
    crossing = {layer: pattern_of(call) for layer, call in recording.cross.items()}
    crossing |= recording.crossed
    sources = source_lengths(prompts, recording.source) or [0] * len(prompts)
    shared, asked = SharedMasks(), recording.request

    def parts(row: int, length: int) -> Parts:
        """A recurrent layer's pattern stands in both caches, unless it has softmax attention too:
        then each cache has its own."""
        numbers = _logits(recording, row, length, last=logits == "last") if logits else None
        residual = _residual(recording, row, length) if asked.residual else None
        recurrent = _unpadded(effective, asked, row, shared)
        patterns = {**recurrent, **_unpadded(softmax, asked, row, shared)}
        states = _states(recording, row)
        gates = {key: _gate(recording, key, row, length) for key in recording.gates}
        specs = {key: asked.gates[key].spec for key in gates}
        return Parts(
            logits=numbers,
            residual=residual,
            attention=AttentionCache.from_layers(
                patterns, n_model_layers=info.n_layers, reasons=asked.absent
            )
            if patterns
            else None,
            effective=AttentionCache.from_layers(
                recurrent, n_model_layers=info.n_layers, reasons=asked.absent_effective
            )
            if recurrent
            else None,
            gates=GateCache.from_records(gates, specs) if asked.gates else None,
            states=StateCache.from_layers(
                {layer: state.parts for layer, state in states.items()},
                {layer: state.spec for layer, state in states.items()},
                positions=asked.states.positions[row],
                seq=length,
                reasons=asked.states.reasons,
            )
            if states
            else None,
            sites=SiteCache.from_values(
                {key: _site(recording, key, row, length, shared) for key in recording.sites}
            )
            if asked.sites
            else None,
            cross_attention=CrossAttentionCache.from_layers(
                _across(crossing, asked, row, sources[row]),
                n_model_layers=info.n_layers,
                reasons=asked.absent_cross,
            )
            if crossing
            else None,
        )

    return [
        Capture(
            tokens=list(prompt.strings),
            token_ids=prompt.ids,
            model=info,
            parts=parts(row, len(prompt.ids)),
            prompt_text=prompt.text,
            media=prompt.media,
            source=_source(prompt, None if recording.source is None else sources[row]),
        )
        for row, prompt in enumerate(prompts)
    ]


def _source(prompt: Prompt, positions: int | None) -> Source | None:
    """What the encoder read; of positions that are not those of tokens, their numbers."""
    if positions is None or (prompt.source and len(prompt.source.tokens) == positions):
        return prompt.source
    return frames(positions, place_name(prompt.arguments or {}))


def _own(tensor: Tensor, recording: Recording) -> Tensor:
    # A row of a batch must not keep the whole batch alive.
    return tensor.clone() if len(recording.request.lengths) > 1 else tensor


def _logits(recording: Recording, row: int, length: int, *, last: bool) -> Tensor | None:
    if recording.logits is None:
        return None
    real = recording.logits.detach()[row, :length]
    return real[-1:].clone() if last else _own(real, recording)


def _residual(recording: Recording, row: int, length: int) -> ActivationCache | FullActivationCache:
    def rows(held: Mapping[int, Tensor]) -> dict[int, Tensor]:
        if recording.request.residual == "all":
            return {i: _own(each[row, :length], recording) for i, each in held.items()}
        return {i: _own(last[row], recording) for i, last in held.items()}

    kind = FullActivationCache if recording.request.residual == "all" else ActivationCache
    readouts = rows(recording.readouts) if recording.readouts else None
    return kind.from_layers(rows(recording.residual), readouts=readouts)


def _unpadded(
    patterns: Mapping[int, Pattern], wanted: CaptureRequest, row: int, shared: SharedMasks
) -> Mapping[int, Pattern]:
    if len(wanted.lengths) == 1:
        return patterns
    length = wanted.lengths[row]
    return {i: pattern.unpad(row, length, shared) for i, pattern in patterns.items()}


def _across(
    patterns: Mapping[int, Pattern], wanted: CaptureRequest, row: int, keys: int
) -> Mapping[int, Pattern]:
    if len(wanted.lengths) == 1:
        return patterns
    queries = wanted.lengths[row]
    return {i: unpad_across(pattern, row, queries, keys) for i, pattern in patterns.items()}


def _gate(recording: Recording, key: tuple[str, int], row: int, length: int) -> Tensor:
    site, lengths = recording.request.gates[key], recording.request.lengths
    what = f"{key[0]} of layer {key[1]}"
    calls = recording.gates[key]
    parts = [rows_of(raw, site.layout, len(lengths), max(lengths), what) for raw in calls]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return _own(rows[0] if site.spec.static else rows[row, :length], recording)


def _states(recording: Recording, row: int) -> dict[int, LayerState]:
    calls = recording.states.items()
    return {layer: join_states([call[row] for call in each]) for layer, each in calls}


def _site(
    recording: Recording, key: SiteKey, row: int, length: int, shared: SharedMasks
) -> Tensor | Derived:
    value, site = recording.sites[key], recording.request.sites[key]
    if isinstance(value, Pattern):
        batched = len(recording.request.lengths) > 1
        pattern = value.unpad(row, length, shared) if batched else value
        return PatternValue(pattern, "scores" if site.tap.part == "scores" else "pattern")
    mine = _own(value[row, :length], recording)
    if site.projection is None:
        return mine
    return HeadOut(mine, projection_weight(site.projection, mine.shape[1] * mine.shape[2]))
