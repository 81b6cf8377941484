"""Scales, norms and biases of all blocks together, fitted end-to-end to the dense model.

When every block is coded, what is left is how their errors work together. A short descent by
gradient lowers KL(dense ‖ ternary) of the next token over the calibration text. Trits stay, and in
a second phase, where that is asked, move too: latent weights stand behind them. `Chain` runs the
blocks. What does not lower the divergence on text held out of the fit, with the values as they will
be stored, is thrown away.

Source: the end-to-end phase of EfficientQAT, arXiv 2407.11062, with the dense model's own
distribution as the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.chain import (
    Chain,
    FinishedBlock,
    MovingBlock,
    runs_in_one_graph,
)
from trilens.checkpoint.calibration.device import device_of
from trilens.checkpoint.calibration.fit import FitOptions
from trilens.checkpoint.calibration.streams import Batch, Stream, pieces_of
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["EndToEndFit", "fit_end_to_end", "set_held_out"]

_HELD_OUT = 16_384  # tokens of text that decide, at most
_HELD_OUT_SHARE = 8  # of so many steps one is held out
_PATIENCE = 2  # passes of scales without a gain; trits gain most when their rate has fallen
_BESIDE_TRITS = 0.0086  # of the rate of scales, norms and biases, while trits move too
_WARM = 0.03  # of the steps, while trits begin to move
_STEP = 512  # tokens, for which the rate of trits is
_STREAMED = 2048  # tokens of a step that brings the blocks one by one, at least
_MEMORY = {False: (0.9, 0.999), True: (0.9, 0.99)}  # Adam's, without trits and with them


@dataclass(frozen=True, slots=True, eq=False)
class EndToEndFit:
    """What the fit found.

    Attributes:
        quants: For each block its matrices with new scales and trits; empty: nothing was better.
        vectors: For each block the new values.
        kl_nats_before: Mean divergence of the next token on the text held out of the fit, before.
        kl_nats: The same after.
        trit_changes: Trits that are others.
    """

    quants: tuple[dict[str, PerLayerQuant], ...]
    vectors: tuple[dict[str, Tensor], ...]
    kl_nats_before: float
    kl_nats: float
    trit_changes: int = 0


def fit_end_to_end(
    runner: BlockRunner,
    blocks: Sequence[FinishedBlock],
    batches: Sequence[Batch],
    dense: Stream,
    options: FitOptions,
    observe: Callable[[float], None] = lambda _: None,
) -> EndToEndFit:
    """Fit all blocks together: scales, norms and biases, then where it is asked the trits too.

    A part of the text is held out of both, measured after each pass, and decides: what a pass has
    found counts where the divergence fell there. Two passes of scales without a gain end their
    phase; trits make all of theirs.

    Args:
        runner: runs blocks.
        blocks: every block as it was coded.
        batches: the text.
        dense: what the dense model has after its last block.
        options: how long, how fast.
        observe: called with the share of the work that is done, in [0, 1].

    Memory: one block in float32 three times, 1 byte for each ternary weight of the model (2 with
    two planes), 12 bytes for each scale; a batch's residual stream between all blocks, its
    activations in one block, and its logits three times. While trits move, 16 bytes for each
    ternary weight of the model. Of a small model (see `Chain`) the graph of
    all blocks.
    """
    if not runs_in_one_graph(runner.n_parameters):
        options = replace(options, step_tokens=max(options.step_tokens, _STREAMED))
    text, held_out = set_held_out(batches, options)
    nothing = EndToEndFit(tuple({} for _ in blocks), tuple({} for _ in blocks), 0.0, 0.0)
    passes = options.whole_passes + options.trit_passes
    if not any(MovingBlock(block).trainable for block in blocks) or not text or passes == 0:
        return nothing

    def target(batch: Batch) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(runner.logits(batch.ids, dense.read(batch)), -1)

    fit = _Fit(runner, text, held_out, target, options)
    before = Chain(runner, [MovingBlock(block, device_of(runner)) for block in blocks]).measure(
        held_out, target
    )
    if not 0 < before < math.inf:
        return nothing
    found, kl = list(blocks), before
    share = options.whole_passes / passes
    if options.whole_passes:
        found, kl = fit.phase(found, kl, free=False, observe=lambda x: observe(share * x))
    if options.trit_passes:
        observe(share)
        found, kl = fit.phase(
            found, kl, free=True, observe=lambda x: observe(share + (1 - share) * x)
        )
    if not kl < before:
        return EndToEndFit(nothing.quants, nothing.vectors, before, before)
    return EndToEndFit(
        tuple(dict(block.quants) for block in found),
        tuple(dict(block.vectors) for block in found),
        before,
        kl,
        _changes(blocks, found),
    )


def set_held_out(
    batches: Sequence[Batch], options: FitOptions
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """The text in steps, and a part of it that decides; of a single step it is that step itself."""
    pieces = pieces_of(batches, options.step_tokens)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(pieces), generator=generator).tolist()
    most = max(1, _HELD_OUT // options.step_tokens)
    count = min(most, max(1, len(pieces) // _HELD_OUT_SHARE))
    held_out = tuple(pieces[i] for i in sorted(order[:count]))
    text = tuple(pieces[i] for i in sorted(order[count:]))
    return text or held_out, held_out


@dataclass(frozen=True, slots=True)
class _Fit:
    """What stays the same through the phases of a fit."""

    runner: BlockRunner
    text: Sequence[Batch]
    held_out: Sequence[Batch]
    target: Callable[[Batch], Tensor]
    options: FitOptions

    def phase(
        self,
        blocks: Sequence[FinishedBlock],
        kl_nats: float,
        *,
        free: bool,
        observe: Callable[[float], None],
    ) -> tuple[list[FinishedBlock], float]:
        """Descend, and give the best that was seen on the text held out."""
        options = self.options
        parts = [MovingBlock(block, device_of(self.runner)) for block in blocks]
        latents: list[Tensor] = []
        if free:
            for index, part in enumerate(parts):
                latents += part.free_trits(self.runner.block(index))
            if not latents:
                return list(blocks), kl_nats
        model = Chain(self.runner, parts)
        passes = options.trit_passes if free else options.whole_passes
        # What is nearly right needs small steps; beside trits they are small for any divergence.
        rate = options.whole_rate * (_BESIDE_TRITS if free else min(1.0, kl_nats))
        groups: list[dict[str, Any]] = [
            {"params": [tensor for part in parts for tensor in part.trainable], "lr": rate}
        ]
        n_steps = passes * len(self.text)
        # So does what follows the gradient of little text, which is noise for the most part.
        share = math.sqrt(options.step_tokens / _STEP)
        of_latents = share * options.trit_rate
        groups += [{"params": latents, "lr": of_latents}] if latents else []
        adam = torch.optim.Adam(groups, betas=_MEMORY[free])
        falling = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda n: _course(n, n_steps, _WARM if free else 0.0)
        )
        if free:
            model.round_products(self.text[0], self.target(self.text[0]))
        generator = torch.Generator().manual_seed(options.seed)
        best, least, idle = list(blocks), kl_nats, 0
        for done in range(passes):
            for n, i in enumerate(torch.randperm(len(self.text), generator=generator).tolist()):
                observe((done * len(self.text) + n) / n_steps)
                adam.zero_grad()
                model.learn(self.text[i], self.target(self.text[i]))
                adam.step()
                for part in parts:
                    part.settle(options.trit_pull * adam.param_groups[-1]["lr"])
                falling.step()
            now = model.measure(self.held_out, self.target)
            idle = 0 if now < least else idle + 1
            if now < least:
                best, least = [part.finished_now() for part in parts], now
            if idle == _PATIENCE and not free:
                break
        return best, least


def _course(step: int, n_steps: int, warm: float) -> float:
    """The rate's share at a step: it rises along a line, and falls along a cosine."""
    rising = (step + 1) / (warm * n_steps) if warm else 1.0
    return min(1.0, rising) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, step / n_steps))))


def _changes(before: Sequence[FinishedBlock], after: Sequence[FinishedBlock]) -> int:
    """How many trits are others."""
    return sum(
        int((old != new).sum())
        for block, now in zip(before, after, strict=True)
        for path, quant in now.quants.items()
        for old, new in zip(_planes(block.quants[path]), _planes(quant), strict=True)
    )


def _planes(quant: PerLayerQuant) -> list[Tensor]:
    return [quant.trits] if quant.second_trits is None else [quant.trits, quant.second_trits]
