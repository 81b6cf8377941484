"""From recorded kernel calls to effective attention, proven on the pass that gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trilens.caches.patterns.channel.heads import ChannelHeadsPattern
from trilens.caches.patterns.channel.pattern import ChannelPattern
from trilens.caches.patterns.protocol import Pattern
from trilens.errors import CaptureError, UsageError
from trilens.models.gates.effective import effective_of
from trilens.models.gates.effective_terms import Effective, tolerance_of
from trilens.models.gates.kernels import KernelRecord

__all__ = ["effective_patterns"]

# Heads are proven together; of channels, which may be thousands, so many.
_CHANNELS = 8


@torch.no_grad()
def effective_patterns(
    kernels: Mapping[int, Sequence[KernelRecord]], lengths: Sequence[int], proven: set[int]
) -> dict[int, Pattern]:
    """The effective attention of each recorded layer, over the whole padded batch.

    Several calls of one kernel in a layer are its heads, each proven for itself. A layer that is
    not among the proven is checked first: from the middle and the last token of every prompt, W·v
    with the kernel's own skip and gate must be the kernel's output.

    Args:
        kernels: calls of kernel functions by layer.
        lengths: real tokens of each prompt.
        proven: layers that passed the check before; those that pass it now are added.

    Raises:
        CaptureError: the check failed, or several calls of a layer are no heads of one pattern.
        AttentionPathError: a kernel started from a state that is not empty.
    """
    patterns: dict[int, Pattern] = {}
    for layer, calls in kernels.items():
        found = []
        for call in calls:
            effective = _effective(layer, call)
            if layer not in proven:
                _prove(layer, call.function, effective, lengths)
            found.append(effective.pattern)
        patterns[layer] = found[0] if len(found) == 1 else _heads(layer, calls[0].function, found)
        proven.add(layer)
    return patterns


def _effective(layer: int, call: KernelRecord) -> Effective:
    try:
        return effective_of(call.function, call.arguments, call.result)
    except UsageError as error:
        raise CaptureError(
            f"{call.function} of layer {layer} was called with values that have no effective "
            f"attention: {error}"
        ) from error


def _heads(layer: int, function: str, found: list[Pattern]) -> Pattern:
    """The calls of one layer, which the probe saw side by side, as heads."""
    parts = [pattern for pattern in found if isinstance(pattern, ChannelPattern)]
    if len(parts) != len(found):
        raise CaptureError(
            f"layer {layer} called {function} {len(found)} times in one pass: it has no single "
            "effective attention; capture without effective=True"
        )
    return ChannelHeadsPattern(parts)


def _prove(layer: int, function: str, effective: Effective, lengths: Sequence[int]) -> None:
    step = 1 if effective.channel is None else -(-effective.units // _CHANNELS)
    units = range(0, effective.units, step)
    allowed = tolerance_of(effective)
    for row, length in enumerate(lengths):
        positions = sorted({length // 2, length - 1})
        found = effective.difference(positions, row, units, length)
        # Not found > allowed: a NaN proves nothing.
        if not found <= allowed:
            raise CaptureError(
                f"effective attention of layer {layer} is not proven: W·v differs from the output "
                f"of {function} by {found:.2g} of its largest value ({allowed:.0e} is allowed); "
                "capture without effective=True"
            )
