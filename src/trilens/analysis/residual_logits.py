"""Logits of the residual streams of several layers, some positions at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trilens.lens.lens import Lens

__all__ = ["CHUNK_ELEMENTS", "residual_logits"]

CHUNK_ELEMENTS = 1 << 23
"""Logits that are held at a time: 32 MB in float32."""


def residual_logits(
    lens: Lens, residuals: Sequence[Tensor], vocab: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The model's own final norm and unembedding of every layer, chunk after chunk of positions.

    Args:
        lens: the model.
        residuals: one [positions, d_model] per layer.
        vocab: only ids below this; None for all.

    Yields:
        Which positions, and their logits [layers, some, vocab] in the model's dtype.

    Memory
        `CHUNK_ELEMENTS` logits, or those of one position in all layers where they are more.
    """
    layers, positions = len(residuals), len(residuals[0])
    step = max(1, CHUNK_ELEMENTS // (layers * (lens.anatomy.vocab or 1)))
    # Layers of a model may lie on several devices; the unembedding is on the last one's.
    device = residuals[-1].device
    for start in range(0, positions, step):
        some = slice(start, min(start + step, positions))
        yield some, lens.unembed(torch.stack([x[some].to(device) for x in residuals]))[..., :vocab]
