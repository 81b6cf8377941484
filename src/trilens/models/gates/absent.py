"""Why a layer has no attention pattern in a capture, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from trilens.models.anatomy import Anatomy
from trilens.models.gates.mixers import Recurrent

__all__ = ["attention_reasons", "cross_reasons", "effective_reasons"]

_LEFT_OUT = "not captured: layers= left it out"


def attention_reasons(
    anatomy: Anatomy,
    recurrences: Mapping[int, Recurrent],
    chosen: Collection[int],
    held: Collection[int],
) -> dict[int, str]:
    """Reasons of the layers that hold neither softmax nor effective attention.

    Args:
        anatomy: where softmax attention is.
        recurrences: where a recurrence is.
        chosen: the layers that were captured.
        held: those that have a pattern.
    """

    def why(layer: int) -> str:
        recurrent = recurrences.get(layer)
        if layer not in chosen:
            return _LEFT_OUT
        if layer in anatomy.other_attention:
            return anatomy.other_attention[layer]
        if layer in anatomy.attention:
            return "its softmax attention was not asked for: capture with attention=True"
        if recurrent is None:
            return "it has neither softmax attention nor a known recurrence"
        if recurrent.refusal:
            return f"recurrent, without effective attention: {recurrent.refusal}"
        return f"recurrent, {recurrent.mixer}: capture with effective=True"

    return {layer: why(layer) for layer in range(anatomy.n_layers) if layer not in held}


def cross_reasons(
    cross: Collection[int], refused: Mapping[int, str], chosen: Collection[int], n_layers: int
) -> dict[int, str]:
    """Reasons of the layers without cross attention in a capture.

    Args:
        cross: the layers that have it.
        refused: why others have none that can be captured.
        chosen: the layers that were captured.
        n_layers: the stack's layers.
    """
    missing = (layer for layer in range(n_layers) if layer not in chosen or layer not in cross)
    return {
        layer: _LEFT_OUT if layer not in chosen else refused.get(layer, "it attends to no source")
        for layer in missing
    }


def effective_reasons(
    anatomy: Anatomy, recurrences: Mapping[int, Recurrent], chosen: Collection[int]
) -> dict[int, str]:
    """Reasons of the layers without effective attention in a capture that asked for it."""

    def why(layer: int) -> str:
        if layer in anatomy.attention or layer in anatomy.other_attention:
            return "no recurrence: softmax attention"
        return "it has no known recurrence"

    return {
        layer: _LEFT_OUT if layer not in chosen else why(layer)
        for layer in range(anatomy.n_layers)
        if layer not in chosen or layer not in recurrences
    }
