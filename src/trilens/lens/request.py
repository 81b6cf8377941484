"""What a caller asks of a capture, read: layers, attention, positions of recurrent states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from trilens.caches.indices import check_index
from trilens.errors import AttentionPathError, UsageError
from trilens.io.messages import listed
from trilens.models.anatomy import Anatomy
from trilens.models.gates.absent import attention_reasons
from trilens.models.gates.claims import GateClaims
from trilens.taps.recording import StateRequest

__all__ = ["read_attention", "read_layers", "read_states"]


def read_layers(layers: Iterable[SupportsIndex] | None, n_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending and distinct; all of them where none are given.

    Raises:
        UsageError: not a list of layer numbers, or an empty one.
        OutOfRangeError: a layer that is not there.
    """
    if layers is None:
        return tuple(range(n_layers))
    try:
        chosen = tuple(layers)
    except TypeError:
        raise UsageError(
            f"layers {layers!r} is not a list: give layer numbers, for example [2, 5]"
        ) from None
    if not chosen:
        raise UsageError("layers is empty: name at least one layer, or leave it out for all")
    return tuple(sorted({check_index(each, n_layers, "layer", "this model") for each in chosen}))


def read_attention(
    layers: Sequence[int], which: str, anatomy: Anatomy, claims: GateClaims, model: str
) -> tuple[int, ...]:
    """The layers, of those asked for, whose softmax attention is captured.

    Args:
        layers: the layers asked for.
        which: their name in messages, like "layers 2, 5" or "this model".
        anatomy: the model's parts.
        claims: what is proven of the model's recurrences.
        model: the model's class, for messages.

    Raises:
        AttentionPathError: one has an attention that can't be captured, or none has any.
    """
    for layer in layers:
        if layer in anatomy.other_attention:
            raise AttentionPathError(
                f"the attention of layer {layer} can't be captured: "
                f"{anatomy.other_attention[layer]}; the residual stream can (attention=False)"
            )
    found = tuple(layer for layer in layers if layer in anatomy.attention)
    if not found:
        have = listed(anatomy.attention, 8)
        why = attention_reasons(anatomy, claims.recurrences, layers, ())[layers[0]]
        raise AttentionPathError(
            f"{which} of {model} has no softmax attention (layers that "
            f"have it: {have}; layer {layers[0]}: {why}); capture without attention=True"
        )
    return found


def read_states(
    states: bool | Iterable[SupportsIndex],
    lengths: Sequence[int],
    layers: Sequence[int],
    claims: GateClaims,
    model: str,
    n_layers: int,
) -> StateRequest:
    """Which recurrent states a pass is to leave behind.

    Args:
        states: True for the last token, or positions, −1 for the last; False for none.
        lengths: real tokens of each prompt.
        layers: the layers asked for.
        claims: what is proven of the model's recurrences.
        model: the model's class, for messages.
        n_layers: the model's layers.

    Raises:
        UsageError: not positions, or none.
        OutOfRangeError: a position that a prompt does not have.
        RecurrentStateError: no layer asked for has a state, or one has a recurrence that is not
            known.
    """
    positions = _positions(states, lengths)
    if states is False:
        return StateRequest()
    found = claims.states_within(layers, model)
    reasons = {}
    for layer in range(n_layers):
        if layer not in claims.state_layers:
            reasons[layer] = "the layer is not recurrent"
        elif layer not in found:
            reasons[layer] = "the layer was not among those captured"
    return StateRequest(found, positions, reasons)


def _positions(
    states: bool | Iterable[SupportsIndex], lengths: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Positions per prompt: from 0, ascending, distinct."""
    try:
        # A string iterates too, and is refused below: its characters are no positions.
        chosen = [-1] if isinstance(states, bool) else list(states)
    except TypeError:
        raise UsageError(
            f"states {states!r} is not an option: True for the last token, or positions, for "
            "example (0, 5, -1)"
        ) from None
    if not chosen:
        raise UsageError("states is empty: name at least one position, or leave it out")

    def read(length: int) -> tuple[int, ...]:
        owner = f"a prompt of {length} tokens"
        index = {check_index(each, length, "position", owner, negative=True) for each in chosen}
        return tuple(sorted(index))

    return tuple(read(length) for length in lengths)
