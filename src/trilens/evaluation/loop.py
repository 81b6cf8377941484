"""The loop that every negative log-likelihood and perplexity comes from.

`logits_of` runs a model over batches of token ids; `mean_nll` sums what any source of logits
predicts. A model that runs block by block, or from a stored stream, is another source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import NonFiniteError, ShapeError, TextError
from trilens.models.forward_call import device_of, forward_arguments
from trilens.results import Tabular
from trilens.taps.mode import evaluating

__all__ = [
    "Perplexity",
    "log_likelihoods",
    "logits_of",
    "mean_nll",
    "perplexity_of",
    "row_chunks",
    "softmax_terms",
]

_CHUNK_ELEMENTS = 1 << 18  # 1 MB of float32 a tensor: it stays in the processor's cache


@dataclass(frozen=True, slots=True)
class Perplexity(Tabular):
    """How well a model predicts a text.

    Attributes:
        nll_nats: mean negative log-likelihood per predicted token, in nats.
        n_tokens: predicted tokens: every token of a block but its first.
        block_length: tokens of the longest block: a token is predicted from those before it in its
            block, so that longer blocks give lower perplexities.
    """

    nll_nats: float
    n_tokens: int
    block_length: int

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood; Inf beyond what a float holds."""
        return perplexity_of(self.nll_nats)

    def table(self) -> list[dict[str, Any]]:
        """One row."""
        return [self.to_dict()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"perplexity": self.value, **asdict(self)}


def perplexity_of(nats: float) -> float:
    """Perplexity of a mean negative log-likelihood; Inf beyond what a float holds."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def logits_of(model: PreTrainedModel, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a model over batches, in evaluation mode and without gradients.

    Shapes: each batch int64 [batch, seq]

    Yields:
        Each batch and its logits [batch, seq, vocab], in the model's dtype and on its device.
    """
    for ids in batches:
        arguments = forward_arguments(model, ids.to(device_of(model)), None)
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            logits: Tensor = model(**arguments).logits
        yield ids, logits


@torch.no_grad()
def mean_nll(predictions: Iterable[tuple[Tensor, Tensor]]) -> Perplexity:
    """Mean negative log-likelihood of every token but the first of each block.

    Shapes: token ids int64 [batch, seq] and logits [batch, seq, vocab], on any device

    Raises:
        TextError: no token is predicted.
        NonFiniteError: the logits hold NaN or infinities.
        ShapeError: logits and token ids that do not belong together.
    """
    total, count, longest = 0.0, 0, 0
    for ids, logits in predictions:
        for row, row_ids in zip(logits, ids, strict=True):
            # PROMOTE: a sum over millions of tokens drifts in float32.
            total -= float(log_likelihoods(row, row_ids).double().sum())
            count += len(row_ids) - 1
            longest = max(longest, len(row_ids))
    if not count:
        raise TextError("no text to measure perplexity on: give at least one block of 2 tokens")
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the model's loss over {count} tokens is {total}: its logits hold NaN or infinities"
        )
    return Perplexity(nll_nats=total / count, n_tokens=count, block_length=longest)


def log_likelihoods(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log probability of every token but the first, given those before it.

    Shapes: logits [seq, vocab]; token_ids int64 [seq]; returns float32 [seq − 1]

    Raises:
        ShapeError: lengths that differ, or ranks other than these.

    Memory: three times 1 MB, or one row of logits in float32.
    """
    if logits.dim() != 2 or token_ids.dim() != 1 or len(logits) != len(token_ids):
        raise ShapeError(
            f"logits {tuple(logits.shape)} and token ids {tuple(token_ids.shape)} do not belong "
            "together: [seq, vocab] and [seq] are needed"
        )
    targets = token_ids[1:].to(logits.device)
    found = logits.new_empty(len(targets), dtype=torch.float32)
    for rows in row_chunks(len(targets), logits.shape[1]):
        some = logits[rows].float()
        *_, found[rows] = softmax_terms(some, some.amax(-1, keepdim=True), targets[rows])
    return found


def row_chunks(n_rows: int, vocab: int) -> Iterator[slice]:
    """Rows of logits that are taken to float32 at once."""
    step = max(1, _CHUNK_ELEMENTS // vocab)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def softmax_terms(rows: Tensor, largest: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a softmax is made of, and the log probability of each target.

    Shapes: rows float32 [n, vocab]; largest [n, 1], of each row; targets [n]

    Returns:
        exp(rows − largest) [n, vocab], its sums [n, 1], log probabilities [n].
    """
    shifted = rows - largest
    target = shifted.gather(1, targets[:, None])
    shares = shifted.exp_()
    total = shares.sum(-1, keepdim=True)
    return shares, total, (target - total.log())[:, 0]
