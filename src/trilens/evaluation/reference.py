"""What a change of weights does to a model's predictions, on a few blocks of tokens.

The logits of the unchanged model are computed once and kept, so that every measurement costs one
forward pass over the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.errors import EmptyPromptError, NonFiniteError, TooLargeError
from trilens.evaluation.output import OutputAccumulator
from trilens.lens.lens import Lens
from trilens.models.forward_call import device_of, forward_arguments
from trilens.taps.mode import evaluating

__all__ = ["Degradation", "ReferenceLogits"]

_KEPT_BYTES = 4 << 30
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Degradation:
    """How far predictions moved from those of the unchanged model.

    Attributes:
        nll_nats: Change of the mean negative log-likelihood per predicted token; Inf where the
            changed model gave NaN or Inf.
        kl_nats: Mean KL(unchanged ‖ changed) of the next-token distributions, in [0, Inf].
        n_tokens: Tokens that were predicted.
    """

    nll_nats: float
    kl_nats: float
    n_tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over that of the unchanged model."""
        return math.exp(self.nll_nats) if self.nll_nats < 700 else math.inf


class ReferenceLogits:
    """The unchanged model's predictions, to measure a changed one against.

    Args:
        lens: the model, with its own weights in place.
        blocks: token ids, each int64 [2 or more tokens].

    Attributes:
        n_tokens: Tokens that are predicted: all but the first of each block.
        nll_nats: Mean negative log-likelihood of the unchanged model.

    Raises:
        EmptyPromptError: no block with a token to predict.
        TooLargeError: the unchanged logits would take more than 4 GB.
        NonFiniteError: the unchanged model gives NaN or Inf.

    Memory: the logits of all tokens in the dtype the model gives: tokens × vocabulary.
    """

    def __init__(self, lens: Lens, blocks: Sequence[Tensor]) -> None:
        self._lens = lens
        usable = [block for block in blocks if block.numel() >= 2]
        if not usable:
            raise EmptyPromptError(
                "the text gives no token to predict: blocks of 2 tokens or more are needed"
            )
        vocab = lens.anatomy.vocab or 0
        needed = sum(block.numel() for block in usable) * vocab * lens.model.dtype.itemsize
        if needed > _KEPT_BYTES:
            raise TooLargeError(
                f"the logits to compare with would take {needed / 2**30:.1f} GB "
                f"(limit {_KEPT_BYTES >> 30} GB): take fewer tokens"
            )
        self._batches = _batches(usable)
        self._kept: list[Tensor] = []
        self.n_tokens = sum(batch.numel() - len(batch) for batch in self._batches)
        own = OutputAccumulator()
        for batch in self._batches:
            logits = _forward(lens, batch)
            try:
                _add(own, logits, logits, batch)
            except NonFiniteError as cause:
                raise NonFiniteError(
                    "the model's own logits hold NaN or Inf: nothing to measure"
                ) from cause
            self._kept.append(logits.clone())
        self.nll_nats = own.result().nll_nats_before or 0.0

    def measure(self, other: Lens | None = None) -> Degradation:
        """Compare a model with the one of the beginning.

        Args:
            other: a model with the same tokens; None for the own one as it is now.
        """
        found = OutputAccumulator()
        lens = other or self._lens
        try:
            for batch, before in zip(self._batches, self._kept, strict=True):
                _add(found, before, _forward(lens, batch), batch)
        except NonFiniteError:
            return Degradation(math.inf, math.inf, self.n_tokens)
        result = found.result()
        nll = (result.nll_nats_after or 0.0) - (result.nll_nats_before or 0.0)
        return Degradation(nll, result.kl_nats_mean, self.n_tokens)


def _forward(lens: Lens, batch: Tensor) -> Tensor:
    """Logits [batch, seq, vocab]."""
    model = lens.model
    arguments = forward_arguments(model, batch.to(device_of(model)), None)
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        logits: Tensor = model(**arguments).logits
    return logits


def _batches(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Blocks of one length together, without padding: right for every family."""
    by_length: dict[int, list[Tensor]] = {}
    for block in blocks:
        by_length.setdefault(block.numel(), []).append(block.reshape(-1))
    found = []
    for length, same in by_length.items():
        step = max(1, _BATCH_TOKENS // length)
        found += [torch.stack(same[i : i + step]) for i in range(0, len(same), step)]
    return found


def _add(into: OutputAccumulator, before: Tensor, after: Tensor, ids: Tensor) -> None:
    for block in zip(before, after, ids, strict=True):
        into.add(*block)
