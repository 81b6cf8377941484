"""A capture of all that a model has of a prompt; what it has not is a note."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trilens.edits import Edit
from trilens.errors import UnclaimedGateError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.auto_classes import is_built_for
from trilens.models.tokens import PromptLike

__all__ = ["available_parts", "capture_known_gates", "whole_capture"]


def whole_capture(
    lens: Lens,
    prompt: PromptLike,
    *,
    layers: Sequence[int] | None = None,
    edits: Sequence[Edit] = (),
) -> tuple[Capture, list[str]]:
    """Residual stream, attention, effective attention, gates and states, as far as they are proven.

    Returns:
        The capture, and a sentence for what the model has not.

    Raises:
        TrilensError: as `Lens.capture`, but for a gate that is unknown.
    """
    asked = range(lens.n_layers) if layers is None else layers
    attention, gates, notes = available_parts(lens, asked)
    capture = capture_known_gates(
        lens, prompt, notes,
        residual="all", attention=attention, gates=gates,
        effective=any(layer in asked for layer in lens.effective_layers),
        states=any(layer in asked for layer in lens.state_layers),
        layers=layers, edits=edits,
    )  # fmt: skip
    return capture, notes


def capture_known_gates(
    lens: Lens, prompt: PromptLike, notes: list[str], *, gates: bool, **asked: Any
) -> Capture:
    """Capture; without gates, and with a note, where one of them is unknown."""
    try:
        return lens.capture(prompt, gates=gates, **asked)
    except UnclaimedGateError as error:
        notes.append(f"no gates: {error}")
        return lens.capture(prompt, gates=False, **asked)


def available_parts(lens: Lens, layers: Sequence[int]) -> tuple[bool, bool, list[str]]:
    """Whether attention and gates can be captured in these layers, and notes on what can't."""
    anatomy, notes = lens.anatomy, []
    odd = [layer for layer in layers if layer in anatomy.other_attention]
    attention = not odd and any(layer in anatomy.attention for layer in layers)
    if odd:
        notes.append(f"no attention patterns: layer {odd[0]}: {anatomy.other_attention[odd[0]]}")
    elif not attention:
        notes.append("no softmax attention in these layers")
    gated = {layer for found in lens.gate_layers.values() for layer in found}
    gates = any(layer in gated for layer in layers)
    if not gates:
        notes.append("no gates are proven in these layers")
    if lens.unused_weights:
        notes.append(f"{len(lens.unused_weights)} stored tensors have no place in this model")
    if is_built_for("masked", lens.model):
        notes.append("a masked language model: next is what it would put in the last token's place")
    return attention, gates, notes
