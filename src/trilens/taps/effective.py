"""From recorded kernel calls to effective attention, proven on the pass that gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trilens.caches.patterns import Pattern
from trilens.errors import CaptureError, UsageError
from trilens.models.effective import Effective, tolerance_of
from trilens.models.gates.effective import effective_of
from trilens.taps.kernels import KernelRecord

__all__ = ["effective_patterns"]

# Heads are proven together; of channels, which may be thousands, so many.
_CHANNELS = 8


@torch.no_grad()
def effective_patterns(
    kernels: Mapping[int, Sequence[KernelRecord]], lengths: Sequence[int], proven: set[int]
) -> dict[int, Pattern]:
    """The effective attention of each recorded layer, over the whole padded batch.

    A layer that is not among the proven is checked first: from the middle and the last token of
    every prompt, W·v with the kernel's own skip and gate must be the kernel's output.

    Args:
        kernels: calls of kernel functions by layer.
        lengths: real tokens of each prompt.
        proven: layers that passed the check before; those that pass it now are added.

    Raises:
        CaptureError: the check failed, or a layer called a kernel more than once.
        AttentionPathError: a kernel started from a state that is not empty.
    """
    patterns: dict[int, Pattern] = {}
    for layer, calls in kernels.items():
        if len(calls) != 1:
            raise CaptureError(
                f"layer {layer} called {calls[0].function} {len(calls)} times in one pass: it has "
                "no single effective attention; capture without effective=True"
            )
        call = calls[0]
        try:
            effective = effective_of(call.function, call.arguments, call.result)
        except UsageError as error:
            raise CaptureError(
                f"{call.function} of layer {layer} was called with values that have no effective "
                f"attention: {error}"
            ) from error
        if layer not in proven:
            _prove(layer, call.function, effective, lengths)
            proven.add(layer)
        patterns[layer] = effective.pattern
    return patterns


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
