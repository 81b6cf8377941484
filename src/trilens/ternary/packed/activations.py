"""Rounded activations, for all packed layers of a model at once."""

from __future__ import annotations

from typing import Literal

from torch import nn

from trilens.errors import UsageError, ValueRangeError
from trilens.ternary.packed.module import PackedModule

__all__ = ["quantize_activations"]


def quantize_activations(model: nn.Module, *, bits: Literal[8] | None = 8) -> int:
    """Let the packed layers of a model round their inputs to 8 bits, or no longer.

    Each token's inputs are divided by its largest magnitude / 127 and rounded to whole numbers:
    every input is off by at most 1/254 of the largest one of its token. Products are then sums of
    whole numbers, the same on every processor up to the float32 roundings of the scales, and faster
    where the library of the package computes them. Gradients pass as if nothing was rounded
    (straight through). It holds for this model in memory: nothing of it is saved.

    Args:
        model: with `TernaryLinear` layers or packed experts.
        bits: 8, or None to use inputs as they come.

    Returns:
        How many layers were set.

    Raises:
        ValueRangeError: other bits.
        UsageError: the model has no packed layer.
    """
    if bits is not None and not (type(bits) is int and bits == 8):
        raise ValueRangeError(f"bits is {bits!r}: pass 8, or None for activations as they come")
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no packed ternary layer: load a checkpoint that "
            "`trilens ternarize` wrote"
        )
    for layer in layers:
        layer.activation_bits = bits
    return len(layers)
