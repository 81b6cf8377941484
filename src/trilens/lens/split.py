"""From one padded batch to one capture per prompt: no pad in any tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.gates import GateCache
from trilens.caches.patterns.protocol import Pattern
from trilens.caches.patterns.softmax.masks import SharedMasks
from trilens.caches.states import StateCache
from trilens.lens.capture import Capture, ModelInfo, Parts
from trilens.models.anatomy import Anatomy
from trilens.models.gates.absent import attention_reasons, effective_reasons
from trilens.models.gates.mixers import Recurrent
from trilens.models.gates.recurrent_states import join_states
from trilens.models.gates.site import rows_of
from trilens.models.tokens import Prompt
from trilens.taps.attention import pattern_of
from trilens.taps.session import CaptureRequest, Recording

__all__ = ["split"]


def split(
    prompts: Sequence[Prompt],
    recording: Recording,
    wanted: CaptureRequest,
    *,
    anatomy: Anatomy,
    recurrences: Mapping[int, Recurrent],
    effective: Mapping[int, Pattern],
    logits: Tensor | None,
    last_logits: bool,
    info: ModelInfo,
) -> list[Capture]:
    """One capture per row. A single row keeps references; rows of a batch are copied out of it.

    Args:
        prompts: one per row of the batch.
        recording: what the pass left behind.
        wanted: what was asked of it.
        anatomy: the model's parts.
        recurrences: where the model is recurrent, to say why a layer has no pattern.
        effective: patterns of recurrent layers, over the padded batch.
        logits: [batch, seq, vocab], or None.
        last_logits: keep those of the last token only.
        info: what a capture says of its model.
    """
    softmax = {layer: pattern_of(call) for layer, call in recording.attention.items()}
    shared = SharedMasks()
    held = softmax.keys() | effective.keys()
    reasons = attention_reasons(anatomy, recurrences, wanted.layers, held)
    no_recurrence = effective_reasons(anatomy, recurrences, wanted.layers)

    def caches(row: int) -> dict[str, AttentionCache | None]:
        """A recurrent layer's pattern stands in both caches, unless it has softmax attention too:
        then each cache has its own."""
        own = _unpadded(softmax, wanted, row, shared)
        recurrent = _unpadded(effective, wanted, row, shared)
        return {
            "attention": _cache({**recurrent, **own}, anatomy, reasons),
            "effective": _cache(recurrent, anatomy, no_recurrence),
        }

    return [
        Capture(
            tokens=list(prompt.strings),
            token_ids=prompt.ids,
            model=info,
            parts=Parts(
                logits=_logits(logits, row, len(prompt.ids), last_logits, len(prompts) > 1),
                residual=_residual(recording, wanted, row),
                **caches(row),
                gates=_gates(recording, wanted, row),
                states=_states(recording, wanted, row),
            ),
        )
        for row, prompt in enumerate(prompts)
    ]


def _own(tensor: Tensor, batched: bool) -> Tensor:
    # A row of a batch must not keep the whole batch alive.
    return tensor.clone() if batched else tensor


def _logits(
    logits: Tensor | None, row: int, length: int, last: bool, batched: bool
) -> Tensor | None:
    if logits is None:
        return None
    real = logits.detach()[row, :length]
    return real[-1:].clone() if last else _own(real, batched)


def _residual(
    recording: Recording, wanted: CaptureRequest, row: int
) -> ActivationCache | FullActivationCache | None:
    if wanted.residual is None:
        return None
    batched, length = len(wanted.lengths) > 1, wanted.lengths[row]
    if wanted.residual == "all":
        return FullActivationCache.from_layers(
            {i: _own(stream[row, :length], batched) for i, stream in recording.residual.items()}
        )
    return ActivationCache.from_layers(
        {i: _own(last[row], batched) for i, last in recording.residual.items()}
    )


def _unpadded(
    patterns: Mapping[int, Pattern], wanted: CaptureRequest, row: int, shared: SharedMasks
) -> Mapping[int, Pattern]:
    if len(wanted.lengths) == 1:
        return patterns
    length = wanted.lengths[row]
    return {i: pattern.unpad(row, length, shared) for i, pattern in patterns.items()}


def _cache(
    patterns: Mapping[int, Pattern], anatomy: Anatomy, reasons: Mapping[int, str]
) -> AttentionCache | None:
    if not patterns:
        return None
    n = anatomy.n_layers
    return AttentionCache.from_layers(patterns, n_model_layers=n, reasons=reasons)


def _gates(recording: Recording, wanted: CaptureRequest, row: int) -> GateCache | None:
    if not wanted.gates:
        return None
    batch, length = len(wanted.lengths), wanted.lengths[row]
    seq = max(wanted.lengths)
    values = {}
    for key, calls in recording.gates.items():
        site = wanted.gates[key]
        what = f"{key[0]} of layer {key[1]}"
        parts = [rows_of(raw, site.layout, batch, seq, what) for raw in calls]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        mine = rows[0] if site.spec.static else rows[row, :length]
        values[key] = _own(mine, batch > 1)
    return GateCache.from_records(values, {key: wanted.gates[key].spec for key in values})


def _states(recording: Recording, wanted: CaptureRequest, row: int) -> StateCache | None:
    request = wanted.states
    if not request.layers:
        return None
    found = {
        layer: join_states([call[row] for call in calls])
        for layer, calls in recording.states.items()
    }
    return StateCache.from_layers(
        {layer: state.parts for layer, state in found.items()},
        {layer: state.spec for layer, state in found.items()},
        positions=request.positions[row],
        seq=wanted.lengths[row],
        reasons=request.reasons,
    )
