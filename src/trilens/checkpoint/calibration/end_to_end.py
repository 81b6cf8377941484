"""Scales, norms and biases of all blocks together, fitted end-to-end to the dense model.

When every block is coded, what is left is how their errors work together. A short descent by
gradient lowers KL(dense ‖ ternary) of the next token over the calibration text; trits stay. One
block at a time is in memory as numbers: a batch runs forward through the blocks, which leaves the
residual stream between them, and backward through each once more. What does not lower the
divergence, with the values as they will be stored, is thrown away.

Source: the end-to-end phase of EfficientQAT, arXiv 2407.11062, with the dense model's own
distribution as the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.fit import FitOptions, Overridden, put_weight, transposed
from trilens.checkpoint.calibration.streams import Batch, Stream, pieces_of
from trilens.checkpoint.calibration.trainable import TrainableMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.rotation import plain_weights
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["EndToEndFit", "FinishedBlock", "fit_end_to_end"]

_PROBED = 8  # batches on which before and after are compared


@dataclass(frozen=True, slots=True, eq=False)
class FinishedBlock:
    """A block that was coded.

    Attributes:
        fixed: Put the ternary matrices that stay as they are into a dense copy of the block.
        quants: Matrices whose scales may move, by path in the block.
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
        quants: For each block the matrices with their new scales; empty where nothing was better.
        vectors: For each block the new values.
        kl_nats_before: Mean divergence of the next token on part of the text, before.
        kl_nats: The same after.
    """

    quants: tuple[dict[str, PerLayerQuant], ...]
    vectors: tuple[dict[str, Tensor], ...]
    kl_nats_before: float
    kl_nats: float


class _Block:
    """One block whose scales and vectors have gradients."""

    def __init__(self, finished: FinishedBlock) -> None:
        self.finished = finished
        self.matrices = {
            path: TrainableMatrix(q, rotate=finished.plan.rotate)
            for path, q in finished.quants.items()
        }
        self.start = {name: value.float() for name, value in finished.vectors.items()}
        self.sizes = {name: v.abs().mean().clamp_min(1e-3) for name, v in self.start.items()}
        self.steps = {
            name: torch.zeros_like(value, requires_grad=True) for name, value in self.start.items()
        }

    @property
    def trainable(self) -> list[Tensor]:
        factors = [factor for matrix in self.matrices.values() for factor in matrix.factors]
        return factors + list(self.steps.values())

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
            vectors = {name: v.to(dtypes[name]) for name, v in self.values().items()}
        return {path: matrix.result() for path, matrix in self.matrices.items()}, vectors


class _Model:
    """The ternary model as a chain of blocks."""

    def __init__(self, runner: BlockRunner, blocks: Sequence[_Block]) -> None:
        self.runner, self.blocks = runner, blocks

    def run(self, index: int, batch: Batch, hidden: Tensor, *, as_stored: bool = False) -> Tensor:
        module = self.blocks[index].put(self.runner.block(index))
        call = self.runner.call(index, batch.ids)
        if not as_stored:
            module = Overridden(module, self.blocks[index].given(module))
            return self.runner.run(index, module, call, hidden)
        quants, vectors = self.blocks[index].stored()
        for path, quant in quants.items():
            put_weight(module, path, plain_weights(quant, self.blocks[index].finished.plan))
        for name, value in vectors.items():
            module.get_parameter(name).data.copy_(value.float())
        return self.runner.run(index, module, call, hidden)

    def divergence(self, batch: Batch, target: Tensor, hidden: Tensor) -> Tensor:
        """Σ KL(dense ‖ ternary) over the tokens of a batch, in nats."""
        found = torch.log_softmax(self.runner.logits_with_gradient(batch.ids, hidden), -1)
        return nn.functional.kl_div(found, target, log_target=True, reduction="sum")

    def learn(self, batch: Batch, target: Tensor) -> None:
        """Add the gradient of the mean divergence on a batch to everything that moves."""
        between = [self.runner.first(batch.ids)]
        with torch.no_grad():
            for index in range(len(self.blocks)):
                between.append(self.run(index, batch, between[-1]))
        last = between.pop().requires_grad_(True)
        with torch.enable_grad():
            (self.divergence(batch, target, last) / batch.ids.numel()).backward()  # type: ignore[no-untyped-call]
            gradient = last.grad
            for index in reversed(range(len(self.blocks))):
                entered = between.pop().requires_grad_(True)
                output = self.run(index, batch, entered)
                output.backward(gradient)  # type: ignore[no-untyped-call]
                gradient = entered.grad

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], target: Callable[[Batch], Tensor]) -> float:
        """Mean divergence with the values as they will be stored, in nats."""
        total = count = 0.0
        for batch in batches:
            hidden = self.runner.first(batch.ids)
            for index in range(len(self.blocks)):
                hidden = self.run(index, batch, hidden, as_stored=True)
            total += float(self.divergence(batch, target(batch), hidden))
            count += batch.ids.numel()
        return total / count


def fit_end_to_end(
    runner: BlockRunner,
    blocks: Sequence[FinishedBlock],
    batches: Sequence[Batch],
    dense: Stream,
    options: FitOptions,
    observe: Callable[[float], None] = lambda _: None,
) -> EndToEndFit:
    """Fit all blocks together.

    Args:
        runner: runs blocks.
        blocks: every block as it was coded.
        batches: the text.
        dense: the dense model's residual stream after its last block.
        options: how long, how fast.
        observe: called with the share of the work that is done, in [0, 1].

    Memory: one block in float32 three times, 1 byte for each ternary weight of the model (2 with
    two planes), 12 bytes for each scale; a batch's residual stream between all blocks, its
    activations in one block, and its logits three times.
    """
    parts = [_Block(block) for block in blocks]
    model = _Model(runner, parts)

    def target(batch: Batch) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(runner.logits(batch.ids, dense.read(batch)), -1)

    nothing: EndToEndFit = EndToEndFit(tuple({} for _ in parts), tuple({} for _ in parts), 0.0, 0.0)
    trainable = [tensor for part in parts for tensor in part.trainable]
    if not trainable or not batches or options.whole_passes == 0:
        return nothing
    probed = batches[:_PROBED]
    before = model.measure(probed, target)
    if not 0 < before < math.inf:
        return nothing
    # What is nearly right needs small steps.
    rate = options.whole_rate * min(1.0, before)
    adam = torch.optim.Adam(trainable, lr=rate)
    batches = pieces_of(batches, options.step_tokens)
    n_steps = options.whole_passes * len(batches)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, n_steps, rate / 20)
    generator = torch.Generator().manual_seed(options.seed)
    done = 0
    for _ in range(options.whole_passes):
        for i in torch.randperm(len(batches), generator=generator).tolist():
            observe(done / n_steps)
            adam.zero_grad()
            model.learn(batches[i], target(batches[i]))
            adam.step()
            falling.step()
            done += 1
    after = model.measure(probed, target)
    if not after < before:
        return EndToEndFit(nothing.quants, nothing.vectors, before, before)
    found = [part.stored() for part in parts]
    return EndToEndFit(tuple(q for q, _ in found), tuple(v for _, v in found), before, after)
