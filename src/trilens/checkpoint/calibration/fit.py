"""Norms, biases and group scales of a ternary block, fitted to what the dense block gives.

A short descent by gradient on the calibration text: trits stay as they are, a few numbers for each
row move. The order of the batches comes from the seed. What does not lower the error over the full
text, with the values as they will be stored, is thrown away.

Source: block-wise reconstruction, BRECQ, arXiv 2102.05426, without its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trilens.checkpoint.calibration.handover import Carried, Key
from trilens.checkpoint.calibration.streams import Batch, Stream, pieces_of
from trilens.checkpoint.calibration.trainable import TrainableMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.rotation import plain_weights
from trilens.taps.step_reads import reading_steps
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["BlockFit", "FitOptions", "Overridden", "fit_block", "put_weight", "transposed"]

RunBlock = Callable[[nn.Module, Batch, Carried], Mapping[Key, Tensor]]
"""Runs a block on what stands before it."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How long and how fast.

    Attributes:
        passes: Over the text.
        rate: The first step of Adam, of each value's size, for an error of 1: it is multiplied by
            the root of the block's relative error, since what is nearly right needs small steps.
            It falls to a twentieth along a cosine.
        step_tokens: Tokens that a step looks at, at least one block of them; where each step of the
            fit of all blocks brings them one by one, 2,048 if that is more.
        block_tokens: Tokens that blocks are coded and fitted on, at most, by a rule that fits all
            blocks together, which takes all text; None for all text.
        whole_passes: Over the text, when all blocks are fitted together; 0 for not at all.
        whole_rate: Likewise, for a divergence of 1 nat; while trits move, a small share of it
            whatever the divergence is.
        trit_passes: Over the text, when the trits of all blocks move too; 0 for not at all.
        trit_rate: The largest step of Adam for the latent weights behind the trits, in units of
            their scale, for steps of 512 tokens: it grows with their root.
        trit_pull: How strongly a latent weight is drawn to its trit: after each step it goes this
            share of its way there, times the step's rate.
        seed: Of the order of the batches.
    """

    passes: int = 4
    rate: float = 0.1
    step_tokens: int = 2048
    block_tokens: int | None = None
    whole_passes: int = 4
    whole_rate: float = 0.1
    trit_passes: int = 0
    trit_rate: float = 4e-3
    trit_pull: float = 0.15
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class BlockFit:
    """What the fit found.

    Attributes:
        quants: The matrices with their new scales, by path in the block.
        vectors: New norm weights and biases, by parameter name in the block, in their own dtype.
        error_before: Σ(y − ŷ)²/Σy² of the block's output over the text, before; where it hands
            on more than the residual stream, the mean of its tensors' errors.
        error: The same after.
    """

    quants: dict[str, PerLayerQuant]
    vectors: dict[str, Tensor]
    error_before: float
    error: float


def fit_block(
    block: nn.Module,
    quants: Mapping[str, PerLayerQuant],
    vectors: Mapping[str, torch.dtype],
    *,
    batches: Sequence[Batch],
    inputs: Stream,
    targets: Stream,
    run: RunBlock,
    counted: Sequence[Key],
    plan: TernaryPlan,
    options: FitOptions,
    as_coded: RunBlock | None = None,
) -> BlockFit:
    """Fit, and leave the block with the better values.

    Args:
        block: the block with its ternary matrices in place, in float32.
        quants: these matrices, by path.
        vectors: the vectors that may move, and the dtype in which each is stored.
        batches: of the text.
        inputs: what stands before the block, as the ternary blocks before give it.
        targets: what stands after it, as the dense model gives it.
        run: how to run it.
        counted: which of that is the block's own; the error is the mean of theirs.
        plan: whether matrices are transposed.
        options: how long, how fast.
        as_coded: a faster way to run it while it is as it was coded.
    """
    task = _Task(block, batches, inputs, targets, run, tuple(counted))
    before = task.error(as_coded)
    start = {name: block.get_parameter(name).detach().clone() for name in vectors}
    weights = {path: _weight_of(block, path).clone() for path in quants}
    if not before > 0 or not (quants or vectors):
        return BlockFit(dict(quants), {}, before, before)
    rate = options.rate * before**0.5
    values, new_quants = task.descend(quants, start, plan, options, rate)
    new_vectors = {name: values[name].to("cpu", dtype) for name, dtype in vectors.items()}
    for path, quant in new_quants.items():
        put_weight(block, path, plain_weights(quant, plan))
    for name, value in new_vectors.items():
        block.get_parameter(name).data.copy_(value.float())
    after = task.error()
    if after < before:
        # A small step can round to nothing in bfloat16.
        old = {n: start[n].to("cpu", v.dtype) for n, v in new_vectors.items()}
        moved = {n: v for n, v in new_vectors.items() if not torch.equal(v, old[n])}
        return BlockFit(new_quants, moved, before, after)
    for path, weight in weights.items():
        _weight_of(block, path).copy_(weight)
    for name, value in start.items():
        block.get_parameter(name).data.copy_(value)
    return BlockFit(dict(quants), {}, before, before)


def put_weight(block: nn.Module, path: str, weights: Tensor) -> None:
    """Put Ŵ [out, in] in place of a layer's weight, whichever way round it holds it."""
    held = _weight_of(block, path)
    held.copy_(
        weights if held.shape == weights.shape and not transposed(block, path) else weights.T
    )


def transposed(block: nn.Module, path: str) -> bool:
    """Whether a layer holds its weight as [in, out]."""
    return not isinstance(block.get_submodule(path), nn.Linear)  # else transformers' Conv1D


def _weight_of(block: nn.Module, path: str) -> Tensor:
    return block.get_parameter(f"{path}.weight").data


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """The block, and what it is given and has to give for each batch."""

    block: nn.Module
    batches: Sequence[Batch]
    inputs: Stream
    targets: Stream
    run: RunBlock
    counted: tuple[Key, ...]

    @torch.no_grad()
    def error(self, run: RunBlock | None = None) -> float:
        wrong, energy = dict.fromkeys(self.counted, 0.0), dict.fromkeys(self.counted, 0.0)
        for batch in self.batches:
            targets = self.targets.read(batch)
            found = (run or self.run)(self.block, batch, self.inputs.read(batch))
            for key in self.counted:
                target = targets[key].to(found[key].device)
                # PROMOTE: sums over a whole text drift in float32.
                wrong[key] += float((found[key] - target).square().sum(dtype=torch.float64))
                energy[key] += float(target.square().sum(dtype=torch.float64))
        each = [wrong[key] / energy[key] if energy[key] else 0.0 for key in self.counted]
        return sum(each) / max(1, len(each))

    def difference(self, found: Mapping[Key, Tensor], targets: Carried) -> Tensor:
        """The same on one batch, with a gradient."""
        pairs = [(found[key], targets[key].to(found[key].device)) for key in self.counted]
        each = [(x - y).square().sum() / y.square().sum().clamp_min(1e-12) for x, y in pairs]
        return each[0] if len(each) == 1 else torch.stack(each).mean()

    def descend(
        self,
        quants: Mapping[str, PerLayerQuant],
        start: Mapping[str, Tensor],
        plan: TernaryPlan,
        options: FitOptions,
        rate: float,
    ) -> tuple[dict[str, Tensor], dict[str, PerLayerQuant]]:
        """Adam on factors of the scales and steps of the vectors, each relative to its own size."""
        trainable = {
            path: TrainableMatrix(
                quant, rotate=plan.rotate, device=_weight_of(self.block, path).device
            )
            for path, quant in quants.items()
        }
        sizes = {name: value.abs().mean().clamp_min(1e-3) for name, value in start.items()}
        steps = {name: torch.zeros_like(value, requires_grad=True) for name, value in start.items()}
        parameters = [f for m in trainable.values() for f in m.factors] + list(steps.values())
        if not parameters or not self.batches:
            return dict(start), dict(quants)
        adam = torch.optim.Adam(parameters, lr=rate)
        batches = pieces_of(self.batches, options.step_tokens)
        n_steps = options.passes * len(batches)
        falling = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda n: 0.05 + 0.475 * (1 + math.cos(math.pi * n / n_steps))
        )
        generator = torch.Generator().manual_seed(options.seed)
        for _ in range(options.passes):
            for i in torch.randperm(len(batches), generator=generator).tolist():
                batch, targets = batches[i], self.targets.read(batches[i])
                given = {}
                for path, matrix in trainable.items():
                    weights = matrix.weights()
                    given[f"{path}.weight"] = weights.T if transposed(self.block, path) else weights
                given |= {name: start[name] + sizes[name] * step for name, step in steps.items()}
                block = Overridden(self.block, given)
                run = partial(self.run, block, batch, self.inputs.read(batch))
                found = reading_steps(run)
                error = self.difference(found, targets)
                adam.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
                adam.step()
                falling.step()
        with torch.no_grad():
            values = {name: start[name] + sizes[name] * step for name, step in steps.items()}
        return values, {path: matrix.result() for path, matrix in trainable.items()}


class Overridden(nn.Module):
    """A block that runs with other parameters."""

    def __init__(self, block: nn.Module, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "run", lambda *a, **k: functional_call(block, dict(given), a, k))

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the block."""
        return self.run(*args, **kwargs)  # type: ignore[operator]
