"""Scales, norms and biases of all blocks together, fitted end-to-end to the dense model.

When every block is coded, what is left is how their errors work together. A short descent by
gradient lowers KL(dense ‖ ternary) of the next token over the calibration text. Trits stay, and in
a second phase, where that is asked, move too: latent weights stand behind them. One block at a time
is in memory as numbers: a batch runs forward through the blocks, which leaves the residual stream
between them, and backward through each once more. What does not lower the divergence on text held
out of the fit, with the values as they will be stored, is thrown away.

Source: the end-to-end phase of EfficientQAT, arXiv 2407.11062, with the dense model's own
distribution as the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.device import PlacedRunner
from trilens.checkpoint.calibration.fit import FitOptions, Overridden, put_weight, transposed
from trilens.checkpoint.calibration.handover import Carried, Key
from trilens.checkpoint.calibration.streams import Batch, Stream, pieces_of
from trilens.checkpoint.calibration.trainable import TrainableMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.rotation import plain_weights
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["EndToEndFit", "FinishedBlock", "fit_end_to_end", "set_held_out"]

_HELD_OUT = 8  # steps of text that decide, at most
_HELD_OUT_SHARE = 8  # of so many steps one is held out
_PATIENCE = 2  # passes without a gain
_BESIDE_TRITS = 0.1  # of the rate of scales, norms and biases, while trits move too


@dataclass(frozen=True, slots=True, eq=False)
class FinishedBlock:
    """A block that was coded.

    Attributes:
        fixed: Put the ternary matrices that stay as they are into a dense copy of the block.
        quants: Matrices whose scales and trits may move, by path in the block.
        vectors: Norms and biases that may move: parameter in the block → value.
        dtypes: How each is stored.
        plan: Whether matrices are transposed.
    """

    fixed: Callable[[nn.Module], None]
    quants: Mapping[str, PerLayerQuant]
    vectors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    plan: TernaryPlan


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


class _Block:
    """One block whose scales and vectors have gradients."""

    def __init__(self, finished: FinishedBlock, device: torch.device | None = None) -> None:
        self.finished = finished
        self.matrices = {
            path: TrainableMatrix(q, rotate=finished.plan.rotate, device=device)
            for path, q in finished.quants.items()
        }
        self.start = {
            name: value.to(device, torch.float32) for name, value in finished.vectors.items()
        }
        self.sizes = {name: v.abs().mean().clamp_min(1e-3) for name, v in self.start.items()}
        self.steps = {
            name: torch.zeros_like(value, requires_grad=True) for name, value in self.start.items()
        }

    @property
    def trainable(self) -> list[Tensor]:
        factors = [factor for matrix in self.matrices.values() for factor in matrix.factors]
        return factors + list(self.steps.values())

    def free_trits(self, dense: nn.Module) -> list[Tensor]:
        """Let trits move, and give the latent weights behind them."""
        for path, matrix in self.matrices.items():
            weight = dense.get_parameter(f"{path}.weight").data
            matrix.free_trits(weight.T if transposed(dense, path) else weight)
        return [m.latent for m in self.matrices.values() if m.latent is not None]

    def settle(self) -> None:
        """After a step."""
        for matrix in self.matrices.values():
            matrix.settle()

    def finished_now(self) -> FinishedBlock:
        """The block with the values as they will be stored."""
        quants, vectors = self.stored()
        return replace(self.finished, quants=quants, vectors=vectors)

    def put(self, block: nn.Module) -> nn.Module:
        """Put what stays into a dense copy of the block."""
        self.finished.fixed(block)
        return block

    def given(self, block: nn.Module) -> dict[str, Tensor]:
        found = {}
        for path, matrix in self.matrices.items():
            weights = matrix.weights()
            found[f"{path}.weight"] = weights.T if transposed(block, path) else weights
        return found | self.values()

    def values(self) -> dict[str, Tensor]:
        return {
            name: start + self.sizes[name] * self.steps[name] for name, start in self.start.items()
        }

    def stored(self) -> tuple[dict[str, PerLayerQuant], dict[str, Tensor]]:
        dtypes = self.finished.dtypes
        with torch.no_grad():
            vectors = {name: v.to("cpu", dtypes[name]) for name, v in self.values().items()}
        return {path: matrix.result() for path, matrix in self.matrices.items()}, vectors


class _Model:
    """The ternary model as a chain of blocks."""

    def __init__(self, runner: BlockRunner, blocks: Sequence[_Block]) -> None:
        self.runner, self.blocks = runner, blocks

    def run(
        self, index: int, batch: Batch, carried: Carried, *, as_stored: bool = False
    ) -> dict[Key, Tensor]:
        module = self.blocks[index].put(self.runner.block(index))
        call = self.runner.call(index, batch.ids, carried)
        if not as_stored:
            module = Overridden(module, self.blocks[index].given(module))
            return self.runner.run(index, module, call)
        quants, vectors = self.blocks[index].stored()
        for path, quant in quants.items():
            put_weight(module, path, plain_weights(quant, self.blocks[index].finished.plan))
        for name, value in vectors.items():
            module.get_parameter(name).data.copy_(value.float())
        return self.runner.run(index, module, call)

    def divergence(self, batch: Batch, target: Tensor, carried: Carried) -> Tensor:
        """Σ KL(dense ‖ ternary) over the tokens of a batch, in nats."""
        found = torch.log_softmax(self.runner.logits_with_gradient(batch.ids, carried), -1)
        return nn.functional.kl_div(found, target, log_target=True, reduction="sum")

    def learn(self, batch: Batch, target: Tensor) -> None:
        """Add the gradient of the mean divergence on a batch to everything that moves."""
        between: list[dict[Key, Tensor]] = [{}]
        with torch.no_grad():
            for index in range(len(self.blocks)):
                between.append(self.run(index, batch, between[-1]))
        last = _with_gradients(between.pop())
        with torch.enable_grad():
            (self.divergence(batch, target, last) / batch.ids.numel()).backward()  # type: ignore[no-untyped-call]
            for index in reversed(range(len(self.blocks))):
                entered = _with_gradients(between.pop())
                output = self.run(index, batch, entered)
                given = {key: t.grad for key, t in last.items() if t.grad is not None}
                keys = [key for key in given if output[key].requires_grad]
                torch.autograd.backward([output[key] for key in keys], [given[key] for key in keys])
                last = entered

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], target: Callable[[Batch], Tensor]) -> float:
        """Mean divergence with the values as they will be stored, in nats."""
        total = count = 0.0
        for batch in batches:
            carried: dict[Key, Tensor] = {}
            for index in range(len(self.blocks)):
                carried = self.run(index, batch, carried, as_stored=True)
            total += float(self.divergence(batch, target(batch), carried))
            count += batch.ids.numel()
        return total / count


def _with_gradients(carried: Carried) -> dict[Key, Tensor]:
    """Leaves of a graph of their own."""
    return {
        key: t.detach().requires_grad_(True) if t.is_floating_point() else t
        for key, t in carried.items()
    }


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
    found counts where the divergence fell there, and two passes without a gain end the fit.

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
    ternary weight of the model.
    """
    text, held_out = set_held_out(batches, options)
    nothing = EndToEndFit(tuple({} for _ in blocks), tuple({} for _ in blocks), 0.0, 0.0)
    passes = options.whole_passes + options.trit_passes
    if not any(_Block(block).trainable for block in blocks) or not text or passes == 0:
        return nothing

    def target(batch: Batch) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(runner.logits(batch.ids, dense.read(batch)), -1)

    fit = _Fit(runner, text, held_out, target, options)
    before = _Model(runner, [_Block(block, _device(runner)) for block in blocks]).measure(
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
    count = min(_HELD_OUT, max(1, len(pieces) // _HELD_OUT_SHARE))
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
        parts = [_Block(block, _device(self.runner)) for block in blocks]
        latents: list[Tensor] = []
        if free:
            for index, part in enumerate(parts):
                latents += part.free_trits(self.runner.block(index))
            if not latents:
                return list(blocks), kl_nats
        model = _Model(self.runner, parts)
        passes = options.trit_passes if free else options.whole_passes
        # What is nearly right needs small steps.
        rate = options.whole_rate * min(1.0, kl_nats) * (_BESIDE_TRITS if free else 1.0)
        groups: list[dict[str, Any]] = [
            {"params": [tensor for part in parts for tensor in part.trainable], "lr": rate}
        ]
        n_steps = passes * len(self.text)
        groups += [{"params": latents, "lr": options.trit_travel / n_steps}] if latents else []
        adam = torch.optim.Adam(groups)
        falling = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda n: 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, n / n_steps)))
        )
        generator = torch.Generator().manual_seed(options.seed)
        best, least, idle = list(blocks), kl_nats, 0
        for done in range(passes):
            for n, i in enumerate(torch.randperm(len(self.text), generator=generator).tolist()):
                observe((done * len(self.text) + n) / n_steps)
                adam.zero_grad()
                model.learn(self.text[i], self.target(self.text[i]))
                adam.step()
                falling.step()
                for part in parts:
                    part.settle()
            now = model.measure(self.held_out, self.target)
            idle = 0 if now < least else idle + 1
            if now < least:
                best, least = [part.finished_now() for part in parts], now
            if idle == _PATIENCE:
                break
        return best, least


def _device(runner: BlockRunner) -> torch.device | None:
    return runner.device if isinstance(runner, PlacedRunner) else None


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
