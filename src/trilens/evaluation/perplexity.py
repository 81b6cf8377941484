"""Perplexity of a causal language model over token blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilens.errors import NonFiniteError, ShapeError, TextError, ValueRangeError
from trilens.results import Tabular

__all__ = ["Perplexity", "batches_of_blocks", "measure_perplexity", "token_nll_nats"]

# Rows of logits taken to float32 at once: a vocabulary of 128k in float32 is 128 MB then.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class Perplexity(Tabular):
    """How well a model predicts a text.

    Attributes:
        nll_nats: mean negative log-likelihood per predicted token, in nats.
        n_tokens: predicted tokens: every token of a block but its first.
    """

    nll_nats: float
    n_tokens: int

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood; infinite where that is beyond floats."""
        return math.exp(self.nll_nats) if self.nll_nats < 709 else math.inf

    def table(self) -> list[dict[str, Any]]:
        """One row."""
        return [self.to_dict()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"perplexity": self.value, **asdict(self)}


def token_nll_nats(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, given those before it.

    Shapes
        logits [seq, vocab]; token_ids int64 [seq]; result float32 [seq − 1].

    Raises:
        ShapeError: lengths that differ, or ranks other than these.

    Memory: 256 rows of logits in float32 at once.
    """
    if logits.dim() != 2 or token_ids.dim() != 1 or len(logits) != len(token_ids):
        raise ShapeError(
            f"logits {tuple(logits.shape)} and token ids {tuple(token_ids.shape)} do not belong "
            "together: [seq, vocab] and [seq] are needed"
        )
    targets = token_ids[1:].to(logits.device)
    parts = [
        nn.functional.cross_entropy(rows.float(), right, reduction="none")
        for rows, right in zip(
            torch.split(logits[:-1], _ROWS), torch.split(targets, _ROWS), strict=True
        )
    ]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def batches_of_blocks(blocks: Sequence[Tensor], batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """Neighbouring blocks of one length, at most `batch_size` together: no padding is ever needed.

    Raises:
        ValueRangeError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueRangeError(f"batch_size is {batch_size}: it must be at least 1")
    batch: list[Tensor] = []
    for block in blocks:
        if batch and (len(batch) == batch_size or len(block) != len(batch[0])):
            yield tuple(batch)
            batch = []
        batch.append(block)
    if batch:
        yield tuple(batch)


@torch.no_grad()
def measure_perplexity(
    model: nn.Module, blocks: Sequence[Tensor], *, batch_size: int = 8
) -> Perplexity:
    """Measure a causal language model on token blocks, each seen by itself.

    The model runs in evaluation mode; its mode is put back.

    Shapes
        each block int64 [seq].

    Args:
        model: a transformers causal language model.
        blocks: see `trilens.text.documents.token_blocks`.
        batch_size: blocks of equal length per forward pass.

    Raises:
        TextError: no block.
        NonFiniteError: the model gave NaN or infinite losses.

    Memory: the logits of one batch, in the model's dtype.
    """
    if not blocks:
        raise TextError("no text to measure perplexity on: give at least one block of 2 tokens")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches_of_blocks(blocks, batch_size):
            ids = torch.stack(batch).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, row_ids in zip(logits, ids, strict=True):
                # PROMOTE: a sum over millions of tokens drifts in float32.
                total += float(token_nll_nats(row, row_ids).double().sum())
                count += len(row_ids) - 1
    finally:
        for module, training in modes:
            module.training = training
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the model's loss over {count} tokens is {total}: its logits hold NaN or infinities"
        )
    return Perplexity(nll_nats=total / count, n_tokens=count)
