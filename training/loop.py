"""The training loop: any causal language model, warmup then linear decay to zero."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from training.optimizers import make_optimizers

__all__ = ["LoopOptions", "LoopResult", "rate_factor", "train_model"]


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        matrix_rate: peak learning rate of the hidden matrices (Muon).
        other_rate: peak learning rate of everything else (AdamW).
        warmup_steps: steps of linear warmup.
        weight_decay: on the hidden matrices only.
        gradient_clip: largest total gradient norm.
        log_every: steps between progress lines on stderr.
        save_every: steps between calls of the caller's save function.
    """

    steps: int
    matrix_rate: float = 8e-3
    other_rate: float = 5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    log_every: int = 50
    save_every: int = 250


@dataclass(frozen=True)
class LoopResult:
    """What training took.

    Attributes:
        steps: optimizer steps done.
        tokens: training tokens seen, repeats included.
        seconds: wall-clock time of the loop.
        final_loss_nats: mean training loss per token over the last ``log_every`` steps.
    """

    steps: int
    tokens: int
    seconds: float
    final_loss_nats: float


def rate_factor(step: int, options: LoopOptions) -> float:
    """Share of the peak rates at ``step`` (from 0): linear warmup, then linear decay to zero."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    return (options.steps - step) / max(1, options.steps - options.warmup_steps)


def train_model(
    model: PreTrainedModel,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    options: LoopOptions,
    save: Callable[[int], None],
) -> LoopResult:
    """Train ``model`` in place.

    Args:
        model: a causal language model that returns ``logits`` of ``[batch, length, vocab]``.
        batches: endless ``(inputs, labels)``, each int64 ``[batch, length]``.
        options: the schedule.
        save: called with the number of steps done, every ``save_every`` steps.
    """
    optimizers = make_optimizers(
        model, options.matrix_rate, options.other_rate, options.weight_decay
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    model.train()
    started = time.perf_counter()
    tokens = 0
    recent: list[float] = []
    for step in range(options.steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, options)
        inputs, labels = next(batches)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
        tokens += labels.numel()
        recent = [*recent[-(options.log_every - 1) :], loss.item()]
        if (step + 1) % options.log_every == 0:
            _log(step + 1, options.steps, recent, tokens, time.perf_counter() - started)
        if (step + 1) % options.save_every == 0:
            save(step + 1)
    seconds = time.perf_counter() - started
    return LoopResult(options.steps, tokens, seconds, sum(recent) / max(1, len(recent)))


def _log(step: int, steps: int, recent: list[float], tokens: int, seconds: float) -> None:
    mean = sum(recent) / len(recent)
    print(
        f"step {step}/{steps}  train_loss_nats {mean:.4f}  {tokens / seconds:.0f} tokens/s  "
        f"{seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )
