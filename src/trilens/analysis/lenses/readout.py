"""The logits of many residual streams, some positions and some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilens.lens.lens import Lens
from trilens.lens.unembedding import reads_in_parts
from trilens.numbers import at_least

__all__ = ["LogitBlock", "logit_blocks"]

_ELEMENTS = 1 << 21  # 8 MB of float32
_CHUNK = 8192  # tokens: a matrix product large enough to be fast, whatever the vocabulary


@dataclass(frozen=True, slots=True)
class LogitBlock:
    """Logits of some rows and tokens.

    Attributes:
        rows: positions, from 0.
        start: the first token's id.
        logits: [layers, rows, tokens], float32 or wider.
        begins: whether it is the first block of these rows.
        ends: whether it is the last one.
    """

    rows: slice
    start: int
    logits: Tensor
    begins: bool
    ends: bool


def logit_blocks(
    lens: Lens,
    residuals: Sequence[Tensor],
    *,
    vocab: int | None = None,
    first: int = 0,
    chunk: int | None = None,
) -> Iterator[LogitBlock]:
    """Every logit of every stream once; all blocks of some rows come one after another.

    Args:
        lens: the model.
        residuals: streams of the same positions, one per layer.
        vocab: only ids below this; None for all.
        first: a token of the block that comes first among those of its rows.
        chunk: tokens of the vocabulary at once, where the unembedding is a matrix that is read in
            parts; all tokens where it is something else.

    Shapes:
        residuals one [positions, d_model] per layer.

    Raises:
        UsageError: the model has no unembedding.
        ValueRangeError: a chunk below 1.

    Memory:
        8 MB of logits in float32, or those of one position: layers × tokens at once.
    """
    whole = lens.anatomy.vocab or 0
    n_tokens = whole if vocab is None else min(vocab, whole)
    size = _CHUNK if chunk is None else at_least(1, chunk, "chunk")
    if not reads_in_parts(lens.model, lens.anatomy):
        size = max(n_tokens, 1)
    size = min(size, max(n_tokens, 1))
    order = list(range(0, n_tokens, size)) or [0]
    order.sort(key=lambda start: start != first // size * size)
    layers, positions = len(residuals), len(residuals[0])
    step = max(1, _ELEMENTS // (layers * size))
    device = _device(lens.model, residuals[-1])
    for row in range(0, positions, step):
        rows = slice(row, min(row + step, positions))
        # Layers of a model may lie on several devices; a saved capture lies on none of them.
        some = torch.stack([stream[rows].to(device) for stream in residuals])
        for start in order:
            found = lens.unembed(some, tokens=slice(start, min(start + size, n_tokens)))
            # PROMOTE: sums of exponentials over a vocabulary.
            wide = torch.promote_types(found.dtype, torch.float32)
            yield LogitBlock(
                rows, start, found.to(wide), begins=start == order[0], ends=start == order[-1]
            )


def _device(model: nn.Module, residual: Tensor) -> torch.device:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = next(iter(head.parameters()), residual) if isinstance(head, nn.Module) else residual
    return residual.device if weight.is_meta else weight.device
