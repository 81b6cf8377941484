"""A model run block by block: what comes before the blocks, one block at a time, what comes after.

The model itself runs, with blocks that hand on what they are told instead of computing it, and
stops where the requested block is called: so no block's way of being called has to be known, nor
what the model does between its blocks. What a block leaves for later ones, in what it returns and
in what it writes into containers, is seen on a probe, and how long each of these tensors is needed.
That the blocks one after another give what the model gives is proven before anything else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.checkpoint.calibration.experts import computing_one_by_one
from trilens.checkpoint.calibration.handover import Axes, Carried, Form, Key, Made, snapshot
from trilens.checkpoint.calibration.nest import leaves
from trilens.checkpoint.calibration.passing import Passed, Reached, passing
from trilens.checkpoint.calibration.probing import Probed, probe_blocks
from trilens.errors import AnatomyError
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import forward_arguments
from trilens.models.trace import tensors_in
from trilens.taps.mode import evaluating

__all__ = ["BlockCall", "BlockRunner"]


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """How the model calls a block on a batch; good for one run of it.

    Attributes:
        args: As the model passes them.
        kwargs: Likewise.
        carried: What stood before the block.
        hidden: The residual stream among the arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    carried: Carried
    hidden: Tensor


class BlockRunner:
    """Runs a model's blocks one by one, in float32, on what the caller keeps between them.

    The model's own blocks are never run or changed after the proof: `block` gives copies. A block
    that the model runs several times is a block of its own each time.

    Args:
        model: in eval mode; its parts outside the blocks are made float32.
        anatomy: its proven parts.
        before: called when the proof has held and the model is still as it was loaded.

    Raises:
        AnatomyError: the blocks cannot be run one by one; the message names what differs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self._blocks = [block.module for block in anatomy.blocks]
        if not anatomy.unembedding:
            name = type(model).__name__
            raise AnatomyError(f"{name} gives no logits: the damage could not be measured")
        self._wide = False
        with evaluating(model), torch.no_grad():
            self._probed: Probed = probe_blocks(model, anatomy)
            self._prove()
        before()
        self._widen()

    @property
    def n_blocks(self) -> int:
        """How many blocks; one that runs several times counts as often."""
        return len(self._blocks)

    @property
    def n_parameters(self) -> int:
        """Of all blocks, as they run: of one that runs several times each time."""
        return sum(p.numel() for block in self._blocks for p in block.parameters())

    def block(self, index: int) -> nn.Module:
        """A copy of a block in float32, in eval mode, without gradients."""
        twin = copy.deepcopy(self._blocks[index]).float().eval()
        return computing_one_by_one(twin.requires_grad_(False))

    def path(self, index: int) -> str:
        """Where a block stands in the model."""
        return self.anatomy.blocks[index].path

    def form(self, index: int) -> Form:
        """What stands before a block; of `n_blocks`, what the head reads."""
        return Form(
            tuple(
                (key, axes)
                for key, axes in self._probed.axes.items()
                if key[0] < index <= self._probed.needed_until.get(key, -1)
            )
        )

    def changed(self, index: int) -> tuple[Key, ...]:
        """What a block itself makes of that which stands after it, indices and alike left out."""
        return tuple(
            key
            for key, axes in self.form(index + 1).axes
            if key[0] == index
            and key not in self._probed.passed_on
            and axes.dtype.is_floating_point
        )

    def call(self, index: int, ids: Tensor, carried: Carried) -> BlockCall:
        """How the model calls a block on these tokens: `run` takes it, once.

        Shapes: ids int64 [batch, seq]

        Args:
            index: which block.
            ids: the tokens.
            carried: what stands before the block.
        """
        try:
            self._pass(ids, carried, stop=index)
        except Reached as reached:
            nest = (reached.args_given, reached.kwargs)
            hidden = dict(leaves(nest))[self._probed.inputs[index]]
            return BlockCall(*nest, carried, hidden)
        raise AnatomyError(f"block {self.path(index)} is not called on a plain prompt")

    def run(self, index: int, block: nn.Module, call: BlockCall) -> dict[Key, Tensor]:
        """What stands after a block.

        Args:
            index: which block it is.
            block: a copy of it, changed or not.
            call: from `call`, not run yet.
        """
        nest = (call.args, call.kwargs)
        before = snapshot(nest)
        made = Made.of(block(*call.args, **call.kwargs), before, nest).tensors
        if len(made) != len(self._probed.made[index].tensors):
            raise AnatomyError(
                f"{self.path(index)} hands on {len(made)} tensors, where it handed on "
                f"{len(self._probed.made[index].tensors)} on a probe"
            )
        return {
            key: made[key[1]] if key[0] == index else call.carried[key]
            for key, _ in self.form(index + 1).axes
        }

    def residual(self, index: int, carried: Carried) -> Tensor:
        """The residual stream after a block, of what stands there."""
        return carried[(index, self.anatomy.blocks[index].output)]

    @torch.no_grad()
    def logits(self, ids: Tensor, carried: Carried) -> Tensor:
        """What the model makes of what stands after the last block.

        Shapes: ids [batch, seq] → [batch, seq, vocab]

        Memory: the unembedding in float32 from the first call on, and the logits.
        """
        return self.logits_with_gradient(ids, carried)

    def logits_with_gradient(self, ids: Tensor, carried: Carried) -> Tensor:
        """The same, with a gradient for what is carried where that has one."""
        head: Any = self.model.get_output_embeddings()
        if head is not None:
            head.float()
        return self._pass(ids, carried)

    def _pass(self, ids: Tensor, carried: Carried, stop: int | None = None) -> Tensor:
        def made(step: int) -> Passed:
            template = self._probed.made[step]
            axes = [self._probed.axes[(step, n)] for n in range(len(template.tensors))]
            tensors = [
                carried[(step, n)] if (step, n) in carried else self._blank(a, ids)
                for n, a in enumerate(axes)
            ]
            return template, tensors

        with passing(self._blocks, made, stop):
            found = self.model(**forward_arguments(self.model, ids, None)).logits
        return found if isinstance(found, Tensor) else next(tensors_in(found))

    def _blank(self, axes: Axes, ids: Tensor) -> Tensor:
        """What nobody needs, in its form."""
        wide = self._wide and axes.dtype.is_floating_point
        dtype = torch.float32 if wide else axes.dtype
        return torch.zeros(axes.shape(*ids.shape), dtype=dtype, device=ids.device)

    def _prove(self) -> None:
        """Run the blocks one after another, and compare with what the model gave."""
        ids, carried = self._probed.ids, dict[Key, Tensor]()
        for index, module in enumerate(self._blocks):
            carried = self.run(index, module, self.call(index, ids, carried))
            for key, tensor in carried.items():
                if key[0] == index and not torch.equal(
                    tensor, self._probed.made[index].tensors[key[1]]
                ):
                    raise AnatomyError(
                        f"{self.path(index)} by itself gives another output than inside the "
                        "model: it depends on more than its arguments; this model cannot be "
                        "calibrated"
                    )
        if not torch.equal(self._pass(ids, carried), self._probed.logits):
            raise AnatomyError(
                f"{type(self.model).__name__}'s logits depend on more than what its blocks hand on"
            )

    def _widen(self) -> None:
        """Make everything outside the blocks compute in float32, big tables where they are used."""
        inside = {id(module) for block in self._blocks for module in block.modules()}
        head = self.model.get_output_embeddings()
        for module in self.model.modules():
            if id(module) in inside or module is head:
                continue
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _m, _i, output: output.float())
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
        self.model.requires_grad_(False)
        self._wide = True
