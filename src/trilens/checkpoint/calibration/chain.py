"""The ternary model as a chain of blocks whose scales, vectors and trits have gradients.

One block at a time is in memory as numbers: a batch runs forward through the blocks, which leaves
what stands between them, and backward through each once more. Small models run in one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.device import device_of, multiplies_bfloat16
from trilens.checkpoint.calibration.fit import Overridden, put_weight, transposed
from trilens.checkpoint.calibration.handover import Carried, Key
from trilens.checkpoint.calibration.streams import Batch
from trilens.checkpoint.calibration.trainable import TrainableMatrix
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.rotation import plain_weights
from trilens.io.short_memory import is_short_of_memory
from trilens.taps.step_reads import reading_steps
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["Chain", "FinishedBlock", "MovingBlock", "runs_in_one_graph"]

_SMALL = 1 << 24  # parameters of all blocks: 16 bytes of each in one graph
_NEAR = 0.2  # of a gradient's length, that products in bfloat16 may change it by


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


class MovingBlock:
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
        """Factors of scales, and steps of vectors."""
        factors = [factor for matrix in self.matrices.values() for factor in matrix.factors]
        return factors + list(self.steps.values())

    def free_trits(self, dense: nn.Module) -> list[Tensor]:
        """Let trits move, and give the latent weights behind them."""
        for path, matrix in self.matrices.items():
            weight = dense.get_parameter(f"{path}.weight").data
            matrix.free_trits(weight.T if transposed(dense, path) else weight)
        return self.latents

    @property
    def latents(self) -> list[Tensor]:
        """Behind the trits, where they move."""
        return [m.latent for m in self.matrices.values() if m.latent is not None]

    def settle(self, pull: float = 0.0) -> None:
        """After a step: latents keep to where they can turn, drawn by `pull` to their trits."""
        for matrix in self.matrices.values():
            matrix.settle(pull)

    def finished_now(self) -> FinishedBlock:
        """The block with the values as they will be stored."""
        quants, vectors = self.stored()
        return replace(self.finished, quants=quants, vectors=vectors)

    def put(self, block: nn.Module) -> nn.Module:
        """Put what stays into a dense copy of the block."""
        self.finished.fixed(block)
        return block

    def given(self, block: nn.Module) -> dict[str, Tensor]:
        """Parameters of the block as they are now, with gradients."""
        found = {}
        for path, matrix in self.matrices.items():
            weights = matrix.weights()
            found[f"{path}.weight"] = weights.T if transposed(block, path) else weights
        return found | self.values()

    def values(self) -> dict[str, Tensor]:
        """Vectors as they are now, with gradients."""
        return {
            name: start + self.sizes[name] * self.steps[name] for name, start in self.start.items()
        }

    def stored(self) -> tuple[dict[str, PerLayerQuant], dict[str, Tensor]]:
        """Matrices and vectors as they will be stored."""
        dtypes = self.finished.dtypes
        with torch.no_grad():
            vectors = {name: v.to("cpu", dtypes[name]) for name, v in self.values().items()}
        return {path: matrix.result() for path, matrix in self.matrices.items()}, vectors


class Chain:
    """The ternary model as a chain of blocks.

    Attributes:
        rounds: Whether what has gradients is multiplied in bfloat16; values as stored never are.
        is_small: Whether the graph of all blocks fits in memory, so that no block runs twice.
    """

    def __init__(self, runner: BlockRunner, blocks: Sequence[MovingBlock]) -> None:
        self.runner, self.blocks = runner, blocks
        self.rounds = False
        self.is_small = runs_in_one_graph(runner.n_parameters)

    def run(
        self, index: int, batch: Batch, carried: Carried, *, as_stored: bool = False
    ) -> dict[Key, Tensor]:
        """What stands after a block."""
        moving = self.blocks[index]
        module = moving.put(self.runner.block(index))
        call = self.runner.call(index, batch.ids, carried)
        if as_stored:
            quants, vectors = moving.stored()
            for path, quant in quants.items():
                put_weight(module, path, plain_weights(quant, moving.finished.plan))
            for name, value in vectors.items():
                module.get_parameter(name).data.copy_(value.float())
        else:
            module = Overridden(module, moving.given(module))
        with self._products(as_stored):
            return self.runner.run(index, module, call)

    def divergence(
        self, batch: Batch, target: Tensor, carried: Carried, *, as_stored: bool = False
    ) -> Tensor:
        """Σ KL(dense ‖ ternary) over the tokens of a batch, in nats."""
        with self._products(as_stored):
            logits = self.runner.logits_with_gradient(batch.ids, carried)
        found = torch.log_softmax(logits.float(), -1)
        return nn.functional.kl_div(found, target, log_target=True, reduction="sum")

    def learn(self, batch: Batch, target: Tensor) -> None:
        """Add the gradient of the mean divergence on a batch to everything that moves."""
        if self.is_small:
            with torch.enable_grad():
                carried = reading_steps(lambda: self._run_all(batch))
                (self.divergence(batch, target, carried) / batch.ids.numel()).backward()  # type: ignore[no-untyped-call]
            return
        between: list[dict[Key, Tensor]] = [{}]
        with torch.no_grad():
            for index in range(len(self.blocks)):
                between.append(self.run(index, batch, between[-1]))
        last = _with_gradients(between.pop())
        with torch.enable_grad():
            (self.divergence(batch, target, last) / batch.ids.numel()).backward()  # type: ignore[no-untyped-call]
            for index in reversed(range(len(self.blocks))):
                entered = _with_gradients(between.pop())
                output = reading_steps(partial(self.run, index, batch, entered))
                given = {key: t.grad for key, t in last.items() if t.grad is not None}
                keys = [key for key in given if output[key].requires_grad]
                torch.autograd.backward([output[key] for key in keys], [given[key] for key in keys])
                last = entered

    def _run_all(self, batch: Batch) -> dict[Key, Tensor]:
        carried: dict[Key, Tensor] = {}
        for index in range(len(self.blocks)):
            carried = self.run(index, batch, carried)
        return carried

    def round_products(self, batch: Batch, target: Tensor) -> None:
        """Multiply in bfloat16 where this machine gains by it, and where gradients stay.

        That is measured: those of scales and vectors, on one batch, both ways.
        """
        self.rounds = False
        if not multiplies_bfloat16(device_of(self.runner)):
            return
        wide = self._gradient(batch, target)
        self.rounds = True
        try:
            gap = (self._gradient(batch, target) - wide).norm()
        except RuntimeError as cause:
            if is_short_of_memory(cause):
                raise
            self.rounds = False  # an operation of this model that takes no two dtypes
        else:
            self.rounds = bool(gap <= _NEAR * wide.norm())
        self._forget()

    def _gradient(self, batch: Batch, target: Tensor) -> Tensor:
        """Of scales and vectors, one after another."""
        self._forget()
        self.learn(batch, target)
        found = [t.grad for block in self.blocks for t in block.trainable if t.grad is not None]
        return torch.cat([grad.flatten() for grad in found])

    def _forget(self) -> None:
        for block in self.blocks:
            for tensor in (*block.trainable, *block.latents):
                tensor.grad = None

    def _products(self, as_stored: bool) -> AbstractContextManager[object]:
        if as_stored or not self.rounds:
            return nullcontext()
        return torch.autocast(device_of(self.runner).type, torch.bfloat16)

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], target: Callable[[Batch], Tensor]) -> float:
        """Mean divergence with the values as they will be stored, in nats."""
        total = count = 0.0
        for batch in batches:
            carried: dict[Key, Tensor] = {}
            for index in range(len(self.blocks)):
                carried = self.run(index, batch, carried, as_stored=True)
            total += float(self.divergence(batch, target(batch), carried, as_stored=True))
            count += batch.ids.numel()
        return total / count


def runs_in_one_graph(n_parameters: int) -> bool:
    """Whether blocks of so many parameters together run forward once for each step, not twice."""
    return n_parameters <= _SMALL


def _with_gradients(carried: Carried) -> dict[Key, Tensor]:
    """Leaves of a graph of their own."""
    return {
        key: t.detach().requires_grad_(True) if t.is_floating_point() else t
        for key, t in carried.items()
    }
