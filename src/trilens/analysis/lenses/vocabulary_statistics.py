"""What a distribution over a vocabulary is, from its logits a part at a time, each read once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RunningVocabulary", "VocabularyStatistics"]


@dataclass(frozen=True, slots=True)
class VocabularyStatistics:
    """Of the same rows in several layers.

    Attributes:
        top_ids: the most probable tokens, descending: int64 [layers, rows, k].
        top_probabilities: theirs [layers, rows, k].
        entropy_nats: in [0, ln vocab]: [layers, rows].
        kl_nats: KL(reference ‖ layer), in [0, Inf]: [layers, rows]; None without a reference.
        target_logits: of the target token [layers, rows]; None without one.
        target_probabilities: likewise.
        target_ranks: tokens with a larger logit: int64; likewise.
        good: bool [layers, rows]: the logits make a distribution.
    """

    top_ids: Tensor
    top_probabilities: Tensor
    entropy_nats: Tensor
    kl_nats: Tensor | None
    target_logits: Tensor | None
    target_probabilities: Tensor | None
    target_ranks: Tensor | None
    good: Tensor


class RunningVocabulary:
    """Takes logits [layers, rows, some tokens]; the part with the target token comes first.

    With m the largest logit so far it keeps s = Σ exp(x − m), t = Σ exp(x − m) (x − m) and, of the
    reference r, d = Σ exp(r − m) (r − x); each is rescaled where m grows.

    Args:
        k: most probable tokens that are kept.
        target: a token id, or None.
        reference: the layer's index whose distribution the others are compared with, or None.

    Source: online normaliser of the softmax, arXiv 1805.02867.
    """

    def __init__(self, k: int, target: int | None, reference: int | None) -> None:
        self._k = k
        self._target = target
        self._reference = reference
        self._largest: Tensor | None = None

    def add(self, logits: Tensor, start: int) -> None:
        """Logits of the tokens from `start` on."""
        top, ids = logits.topk(min(self._k, logits.shape[-1]))
        if self._largest is None:
            empty = logits.new_zeros(logits.shape[:2])
            self._largest = empty + torch.finfo(logits.dtype).min
            self._sum = self._weighted = self._gap = empty
            self._top, self._ids = top[..., :0], ids[..., :0]
            if self._target is not None:
                self._logit = logits[..., self._target - start].clone()
                self._larger = ids.new_zeros(ids.shape[:2])
        largest = torch.maximum(self._largest, top[..., 0])
        fall = self._largest - largest
        decay = fall.exp()
        shifted = logits - largest[..., None]
        shares = shifted.exp()
        self._weighted = decay * (self._weighted + self._sum * fall) + _products(shares, shifted)
        self._sum = decay * self._sum + shares.sum(-1)
        if self._reference is not None:
            i = self._reference
            self._gap = decay[i] * self._gap + _products(shares[i], logits[i] - logits)
        if self._target is not None:
            self._larger = self._larger + (logits > self._logit[..., None]).sum(-1)
        self._largest = largest
        best = torch.cat([self._top, top], -1)
        self._top, places = best.topk(min(self._k, best.shape[-1]))
        self._ids = torch.cat([self._ids, ids + start], -1).gather(-1, places)

    def result(self) -> VocabularyStatistics:
        """Everything, on the CPU."""
        largest, total = self._largest, self._sum
        if largest is None:
            raise RuntimeError("no logits were added")
        log_total = total.log()
        kl = None
        if self._reference is not None:
            i = self._reference
            # Two differences, not one of sums: equal logits give exactly 0.
            kl = self._gap / total[i] - ((largest[i] - largest) + (log_total[i] - log_total))
            kl = kl.clamp(min=0.0).cpu()
        found = self._target is not None
        return VocabularyStatistics(
            top_ids=self._ids.cpu(),
            top_probabilities=((self._top - largest[..., None]).exp() / total[..., None]).cpu(),
            entropy_nats=(log_total - self._weighted / total).clamp(min=0.0).cpu(),
            kl_nats=kl,
            target_logits=self._logit.cpu() if found else None,
            target_probabilities=((self._logit - largest).exp() / total).cpu() if found else None,
            target_ranks=self._larger.cpu() if found else None,
            # NaN and +Inf make the largest so, and −Inf alone leaves nothing to sum.
            good=(largest.isfinite() & (total > 0)).cpu(),
        )


def _products(shares: Tensor, values: Tensor) -> Tensor:
    """Σ shares · values; a token that has no share counts nothing, whatever its value."""
    return (shares * values).masked_fill_(shares == 0.0, 0.0).sum(-1)
