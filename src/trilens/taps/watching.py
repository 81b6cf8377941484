"""Watching a model's blocks run: how far a pass is, and a place to end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from trilens.taps.undo import undone

__all__ = ["watched"]


@contextmanager
def watched(blocks: Sequence[nn.Module], call: Callable[[], None]) -> Iterator[None]:
    """Have `call` called before each block runs, for the length of the block of code.

    What a block is given is not looked at. What `call` raises ends the pass, and whatever captures
    it undoes its own work.

    Args:
        blocks: modules; one that stands several times is watched once.
        call: runs on the thread that runs the model.
    """
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    def before(_module: nn.Module, _arguments: Any) -> None:
        call()

    with undone(remove):
        for module in dict.fromkeys(blocks):
            handles.append(module.register_forward_pre_hook(before))
        yield
