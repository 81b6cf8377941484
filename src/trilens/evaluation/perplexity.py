"""Perplexity of a causal language model over token blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from trilens.evaluation.loop import Perplexity, logits_of, mean_nll
from trilens.text.token_blocks import batches_by_length

__all__ = ["measure_perplexity"]


def measure_perplexity(
    model: PreTrainedModel, blocks: Sequence[Tensor], *, batch_size: int = 8
) -> Perplexity:
    """Measure a causal language model on token blocks, each seen by itself.

    The model runs in evaluation mode; its mode is put back.

    Shapes: each block int64 [seq]

    Args:
        model: a transformers causal language model.
        blocks: see `trilens.text.token_blocks.token_blocks`.
        batch_size: blocks of equal length per forward pass.

    Raises:
        TextError: no block with a token to predict.
        ValueRangeError: a batch size below 1.
        NonFiniteError: the model gave NaN or infinite losses.

    Memory: the logits of one batch, in the model's dtype.
    """
    return mean_nll(logits_of(model, batches_by_length(blocks, batch_size=batch_size)))
