"""Held-out loss of a causal language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from training.batches import IGNORED_LABEL

__all__ = ["HeldOutLoss", "heldout_loss"]


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean loss and what it is the mean of.

    Attributes:
        loss_nats: mean negative log-likelihood per token, natural logarithm.
        tokens: number of predicted tokens.
    """

    loss_nats: float
    tokens: int


@torch.inference_mode()
def heldout_loss(
    model: PreTrainedModel, inputs: torch.Tensor, labels: torch.Tensor, batch: int = 16
) -> HeldOutLoss:
    """Mean loss over windows, each int64 ``[windows, length]`` (see ``heldout_windows``).

    A window sees nothing before its own start, so a token is predicted from at most
    ``length`` tokens and from 1 at least.
    """
    model.eval()
    total = 0.0
    for first in range(0, len(inputs), batch):
        logits = model(input_ids=inputs[first : first + batch], use_cache=False).logits
        total += functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels[first : first + batch].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        ).item()
    tokens = int((labels != IGNORED_LABEL).sum())
    return HeldOutLoss(loss_nats=total / tokens, tokens=tokens)
