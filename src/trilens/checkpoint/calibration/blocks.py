"""A model run block by block: what comes before the blocks, one block at a time, what comes after.

All but the block that is looked at is passed over: the model runs with blocks that hand their input
on, stops where the requested block is called, and reports the arguments it would have got (masks,
positions). So no block's way of being called has to be known. That this gives what the model gives
is proven on a short probe before anything else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.checkpoint.calibration.experts import computing_one_by_one
from trilens.errors import AnatomyError
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import forward_arguments, probe_ids
from trilens.models.tokens import vocab_size_of
from trilens.models.trace import tensors_in
from trilens.taps.mode import evaluating

__all__ = ["BlockRunner"]

_PROBE_TOKENS = 12


class _StopError(Exception):
    """The requested block was reached."""


@dataclass(frozen=True, slots=True)
class _Call:
    """How a block is called: its arguments, with a gap where the residual stream goes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def on(self, block: nn.Module, hidden: Tensor) -> Any:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        return block(*args, **kwargs)


class BlockRunner:
    """Runs a model's blocks one by one, in float32, on residual streams that the caller keeps.

    The model's own blocks are never run or changed after the proof: `block` gives copies.

    Args:
        model: in eval mode; its parts outside the blocks are made float32.
        anatomy: its proven parts.

    Raises:
        AnatomyError: the blocks cannot be run one by one; the message names what differs.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        self._blocks = [block.module for block in anatomy.blocks]
        self._tuples: dict[int, int] = {}  # blocks that return a tuple, and its length
        self._check_structure()
        with evaluating(model), torch.no_grad():
            self._prove()
        self._widen()

    @property
    def n_blocks(self) -> int:
        """How many blocks."""
        return len(self._blocks)

    def block(self, index: int) -> nn.Module:
        """A copy of a block in float32, in eval mode, without gradients."""
        twin = copy.deepcopy(self._blocks[index]).float().eval()
        return computing_one_by_one(twin.requires_grad_(False))

    def path(self, index: int) -> str:
        """Where a block stands in the model."""
        return self.anatomy.blocks[index].path

    @torch.no_grad()
    def first(self, ids: Tensor) -> Tensor:
        """The residual stream before the first block.

        Shapes: ids int64 [batch, seq] → float32 [batch, seq, d_model]
        """
        call, hidden = self._reach(0, ids)
        del call
        return hidden.float()

    def call(self, index: int, ids: Tensor) -> _Call:
        """How the model would call this block on these tokens: `run` takes it.

        Shapes: ids int64 [batch, seq]
        """
        with torch.no_grad():
            return self._reach(index, ids)[0]

    def run(self, index: int, block: nn.Module, call: _Call, hidden: Tensor) -> Tensor:
        """The residual stream after a block.

        Shapes: hidden [batch, seq, d_model] → the same

        Args:
            index: which block it is.
            block: a copy of it, changed or not.
            call: from `call`, for the same tokens.
            hidden: the residual stream before it.
        """
        return list(tensors_in(call.on(block, hidden)))[self.anatomy.blocks[index].output]

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the residual stream after the last block.

        Shapes: ids [batch, seq], hidden [batch, seq, d_model] → [batch, seq, vocab]

        Memory: the unembedding in float32 from the first call on, and the logits.
        """
        return self.logits_with_gradient(ids, hidden)

    def logits_with_gradient(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The same, with a gradient for the residual stream where that has one."""
        head: Any = self.model.get_output_embeddings()
        if head is not None:
            head.float()
        with self._passing({self.n_blocks - 1: hidden}):
            found = self.model(**forward_arguments(self.model, ids, None)).logits
        return found if isinstance(found, Tensor) else next(tensors_in(found))

    def _reach(self, index: int, ids: Tensor) -> tuple[_Call, Tensor]:
        reached: list[_Call] = []
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = self._passed[0] if self._passed else None
            call, found = _call_of(args, kwargs, hidden)
            reached.append(call)
            seen.append(found)
            raise _StopError

        with self._passing({}):
            handle = self._blocks[index].register_forward_pre_hook(stop, with_kwargs=True)
            try:
                self.model(**forward_arguments(self.model, ids, None))
            except _StopError:
                pass
            finally:
                handle.remove()
        if not reached:
            raise AnatomyError(f"block {self.path(index)} is not called on a plain prompt")
        return reached[0], seen[0]

    @contextmanager
    def _passing(self, given: dict[int, Tensor]) -> Iterator[None]:
        """Let every block hand its input on; those in `given` hand on what is given."""
        self._passed: list[Tensor] = []

        def passing(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                previous = self._passed[0] if self._passed else None
                hidden = given.get(index)
                if hidden is None:
                    hidden = _call_of(args, kwargs, previous)[1]
                self._passed[:] = [hidden]
                length = self._tuples.get(index)
                if length is None:
                    return hidden
                rest: list[Any] = [None] * length
                rest[self.anatomy.blocks[index].output] = hidden
                return tuple(rest)

            return forward

        for index, block in enumerate(self._blocks):
            block.forward = passing(index)
        try:
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    def _check_structure(self) -> None:
        name = type(self.model).__name__
        if self.anatomy.n_streams > 1:
            raise AnatomyError(
                f"{name} keeps {self.anatomy.n_streams} residual streams: not calibrated yet; "
                "ternarize it without calibration, by a rule that reads the weights alone"
            )
        if not self.anatomy.form.batch_first:
            raise AnatomyError(f"{name} has a residual [seq, batch, d_model]: not calibrated yet")
        if len({id(block) for block in self._blocks}) < len(self._blocks):
            raise AnatomyError(
                f"{name} runs one block several times: its matrices have no inputs of their own"
            )
        if not self.anatomy.unembedding:
            raise AnatomyError(f"{name} gives no logits: the damage could not be measured")

    def _prove(self) -> None:
        """Compare each block, run by itself, with what it gave inside the model."""
        ids = probe_ids(self.model, vocab_size_of(self.model), _PROBE_TOKENS)
        outputs: list[Any] = []
        inputs: list[Tensor] = []

        def before(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(_call_of(args, kwargs, None)[1].clone())

        handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in self._blocks]
        handles += [
            b.register_forward_hook(lambda _m, _i, output: outputs.append(output))
            for b in self._blocks
        ]
        try:
            logits = self.model(**forward_arguments(self.model, ids, None)).logits
        finally:
            for handle in handles:
                handle.remove()
        for index, output in enumerate(outputs):
            if isinstance(output, tuple | list):
                self._tuples[index] = len(output)
                if len(list(tensors_in(output))) > 1:
                    raise AnatomyError(
                        f"{self.path(index)} hands on more than the residual stream: the blocks "
                        "cannot be run one by one"
                    )
        for index, block in enumerate(self._blocks):
            call, _ = self._reach(index, ids)
            expected = next(tensors_in(outputs[index]))
            if not torch.equal(self.run(index, block, call, inputs[index]), expected):
                raise AnatomyError(
                    f"{self.path(index)} by itself gives another output than inside the model: it "
                    "depends on more than its arguments; this model cannot be calibrated"
                )
        with self._passing({self.n_blocks - 1: next(tensors_in(outputs[-1]))}):
            rebuilt = self.model(**forward_arguments(self.model, ids, None)).logits
        if not torch.equal(rebuilt, logits):
            raise AnatomyError(
                f"{type(self.model).__name__}'s logits depend on more than its last block's output"
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


def _call_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None
) -> tuple[_Call, Tensor]:
    """Where the residual stream is among a block's arguments: what was handed on, or the first."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(place, value) for place, value in named if isinstance(value, Tensor)]
    same = [pair for pair in tensors if pair[1] is hidden]
    floating = [pair for pair in tensors if pair[1].is_floating_point() and pair[1].ndim == 3]
    if not same and not floating:
        raise AnatomyError("a block is called without a residual stream among its arguments")
    place, value = (same or floating)[0]
    return _Call(args, kwargs, place), value
