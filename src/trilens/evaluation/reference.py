"""What a change of weights does to a model's predictions, on a few blocks of tokens.

The logits of the unchanged model are computed once and stay in memory, so that every measurement
costs one forward pass over the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.errors import EmptyPromptError, NonFiniteError, TooLargeError
from trilens.evaluation.loop import logits_of, mean_nll, perplexity_of
from trilens.evaluation.output import OutputAccumulator
from trilens.evaluation.resumed import Resumed
from trilens.io.short_memory import is_short_of_memory
from trilens.lens.lens import Lens
from trilens.text.token_blocks import batches_by_length

__all__ = ["Degradation", "ReferenceLogits"]

_MAX_BYTES = 4 << 30
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Degradation:
    """How far predictions moved from those of the unchanged model.

    Attributes:
        nll_nats: Change of the mean negative log-likelihood per predicted token; Inf where the
            changed model gave NaN or Inf.
        kl_nats: Mean KL(unchanged ‖ changed) of the next-token distributions, in [0, Inf].
        n_tokens: Tokens that were predicted.
        block_length: Tokens of the longest block, on which a perplexity depends.
    """

    nll_nats: float
    kl_nats: float
    n_tokens: int
    block_length: int | None = None

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over that of the unchanged model."""
        return perplexity_of(self.nll_nats)


class ReferenceLogits:
    """The unchanged model's predictions, to measure a changed one against.

    Args:
        lens: the model, with its own weights in place.
        blocks: token ids, each int64 [2 or more tokens].
        resumable: whether passes may begin at a block: see `first_block`.

    Attributes:
        n_tokens: Tokens that are predicted: all but the first of each block.
        nll_nats: Mean negative log-likelihood of the unchanged model.
        block_length: Tokens of the longest block.

    Raises:
        UsageError: the lens is on a decoder that answers a source.
        EmptyPromptError: no block with a token to predict.
        TooLargeError: the unchanged logits would take more than 4 GB.
        NonFiniteError: the unchanged model gives NaN or Inf.

    Memory: the logits of all tokens in the dtype the model gives: tokens × vocabulary; if
        resumable, the residual stream of every layer too (above 1 GiB in a temporary file).
    """

    def __init__(self, lens: Lens, blocks: Sequence[Tensor], *, resumable: bool = False) -> None:
        lens.check_reads_texts()
        self._lens = lens
        usable = [block.reshape(-1) for block in blocks if block.numel() >= 2]
        if not usable:
            raise EmptyPromptError(
                "the text gives no token to predict: blocks of 2 tokens or more are needed"
            )
        vocab = lens.anatomy.vocab or 0
        needed = sum(block.numel() for block in usable) * vocab * lens.model.dtype.itemsize
        if needed > _MAX_BYTES:
            raise TooLargeError(
                f"the logits to compare with would take {needed / 2**30:.1f} GB "
                f"(limit {_MAX_BYTES >> 30} GB): take fewer tokens"
            )
        self._batches = list(batches_by_length(sorted(usable, key=len), max_tokens=_BATCH_TOKENS))
        self._logits: list[Tensor] = []
        self._resumed = Resumed(lens, self._batches) if resumable else None
        try:
            own = mean_nll(self._recorded(lens))
        except NonFiniteError as cause:
            raise NonFiniteError(
                "the model's own logits hold NaN or Inf: nothing to measure"
            ) from cause
        self.n_tokens, self.nll_nats = own.n_tokens, own.nll_nats
        self.block_length = own.block_length

    def _recorded(self, lens: Lens) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._batches:
            with self._resumed.recording() if self._resumed else nullcontext():
                ((_, logits),) = logits_of(lens.model, [batch])
            self._logits.append(logits.clone())
            yield batch, logits

    def first_block(self, names: Collection[str]) -> int:
        """The first block that a change of these parameters changes.

        Asked before they are changed: that passes can begin there is proven on the model.

        Args:
            names: of the parameters.

        Returns:
            The block for `measure`; 0, a whole pass, where they can begin at no other.
        """
        return self._resumed.first_block(names, self._is_same_from) if self._resumed else 0

    def _is_same_from(self, first_block: int) -> bool:
        try:
            passes = self._passes(self._lens, first_block)
            return all(
                torch.equal(before, logits)
                for before, (_, logits) in zip(self._logits, passes, strict=True)
            )
        # Whatever a model raises where a block hands on a copy, its passes are whole.
        except Exception as cause:
            if is_short_of_memory(cause):
                raise
            return False

    def _passes(self, lens: Lens, first_block: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._batches):
            resumed = self._resumed if first_block else None
            with resumed.begun(first_block, number) if resumed else nullcontext():
                ((_, logits),) = logits_of(lens.model, [batch])
            yield batch, logits

    def measure(self, other: Lens | None = None, *, first_block: int = 0) -> Degradation:
        """Compare a model with the one of the beginning.

        Args:
            other: a model with the same tokens; None for the own one as it is now.
            first_block: of the own one, the first block that is changed, from `first_block`.
        """
        found = OutputAccumulator()
        passes = self._passes(other or self._lens, 0 if other else first_block)
        try:
            for before, (batch, after) in zip(self._logits, passes, strict=True):
                for block in zip(before, after, batch, strict=True):
                    found.add(*block)
        except NonFiniteError:
            return Degradation(math.inf, math.inf, self.n_tokens, self.block_length)
        result = found.result()
        nll = (result.nll_nats_after or 0.0) - (result.nll_nats_before or 0.0)
        return Degradation(nll, result.kl_nats_mean, self.n_tokens, self.block_length)
