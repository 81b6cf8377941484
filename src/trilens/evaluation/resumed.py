"""Passes that begin at a block: what the blocks before it give is known.

A change of one block's weights changes nothing that the blocks before it give. They hand on what
they gave the unchanged model, and compute nothing. That the rest of the model needs no more of them
is proven for each block: begun there, the unchanged model has to give its own logits bit for bit.
Where it does not, passes are whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trilens.io.spilled import spilling
from trilens.lens.lens import Lens
from trilens.taps.hooks import hooked
from trilens.taps.undo import undone

__all__ = ["Resumed"]


class Resumed:
    """What every block of an unchanged model gives on some batches.

    Args:
        lens: the model.
        batches: token ids, each [batch, seq].

    Memory: the residual stream of every layer and token; above 1 GiB in a temporary file, mapped.
    """

    def __init__(self, lens: Lens, batches: Sequence[Tensor]) -> None:
        self._model: nn.Module = lens.model
        blocks = lens.anatomy.blocks
        self._blocks = [block.module for block in blocks]
        values = sum(batch.numel() for batch in batches) * lens.d_model * lens.n_streams
        files = ExitStack()
        put_aside = files.enter_context(spilling(values * len(blocks) * lens.model.dtype.itemsize))
        self._put_aside = put_aside
        self._close = weakref.finalize(self, files.close)
        self._given: list[list[Any]] = []
        self._proven: dict[int, bool] = {0: True}
        self._first = _first_blocks(self._model, [block.path for block in blocks], self._blocks)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the blocks give in the pass over the next batch."""
        given: list[Any] = []

        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            given.append(_copied(output, lambda tensor: self._put_aside(tensor.clone())))

        with hooked(self._model) as hooks:
            for block in dict.fromkeys(self._blocks):
                hooks.after(block, keep)
            yield
        self._given.append(given)

    def first_block(self, names: Collection[str], proof: Callable[[int], bool]) -> int:
        """The first block that computes with any of these parameters, if passes can begin there.

        Args:
            names: of parameters, which are those of the unchanged model.
            proof: whether passes that begin at a block give what whole ones give; asked once.

        Returns:
            The block; 0, with which passes are whole, where they can begin at no other.
        """
        found = min((self._first.get(name, 0) for name in names), default=0)
        if found not in self._proven:
            self._proven[found] = self._replaceable(found) and proof(found)
        return found if self._proven[found] else 0

    def _replaceable(self, first: int) -> bool:
        """Whether the blocks before one run by themselves, each once, as plain modules."""
        before, others = self._blocks[:first], self._blocks[first:]
        alone = len({*map(id, before)} | {*map(id, others)}) == len(self._blocks)
        plain = not any("forward" in vars(block) for block in before)
        return alone and plain and all(len(each) == len(self._blocks) for each in self._given)

    @contextmanager
    def begun(self, first: int, batch: int) -> Iterator[None]:
        """Let the blocks before one hand on what they gave on a batch.

        Args:
            first: the block that runs first; 0 changes nothing.
            batch: number of the batch that the pass is over.
        """
        before = self._blocks[:first]

        def put_back() -> None:
            for block in before:
                vars(block).pop("forward", None)

        with undone(put_back):
            for number, block in enumerate(before):
                block.forward = _giving(self._given[batch][number])
            yield


def _giving(value: Any) -> Callable[..., Any]:
    # A copy: later blocks may write into what they are given.
    return lambda *_args, **_kwargs: _copied(value, torch.clone)


def _copied(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """A nest of tuples, lists and dicts with other tensors; all else by reference."""
    if isinstance(value, Tensor):
        return copy(value.detach())
    if isinstance(value, tuple):
        items = [_copied(item, copy) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_copied(item, copy) for item in value]
    if type(value) is dict:
        return {key: _copied(item, copy) for key, item in value.items()}
    return value


def _first_blocks(
    model: nn.Module, paths: Sequence[str], blocks: Sequence[nn.Module]
) -> dict[str, int]:
    """Parameter name → the first block that computes with its memory; 0 where others do too."""
    first: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            first.setdefault(parameter.data_ptr(), number)
    inside = tuple(f"{path}." for path in paths)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            first[parameter.data_ptr()] = 0
    return {
        name: first[parameter.data_ptr()]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
