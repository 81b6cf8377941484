"""What one short probe saw: every module call in order, with the tensors that went in and came out.

A `Trace` is plain data. It is recorded by `trilens.taps.recorder` and read by the rules that find
blocks, final norm, unembedding and gates; the rules never touch a running model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilens.caches.storage import address_of

__all__ = [
    "AttentionSite",
    "ModuleCall",
    "SoftmaxSite",
    "Trace",
    "parent_path",
    "same",
    "tensors_in",
]

_DEEP = 3


def tensors_in(value: object, depth: int = _DEEP) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings (ModelOutput is one), in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item, depth - 1)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: one storage, or equal values."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    # Tensors that only wrap others (quantized ones) have no address of their own.
    stored = address_of(a) == address_of(b) > 0
    if stored and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return bool(torch.equal(a, b))


def parent_path(path: str) -> str:
    """`model.layers.3` → `model.layers`."""
    return path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of one module. `start` and `end` are ticks of one clock for the whole trace."""

    path: str
    module: nn.Module
    start: int
    end: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def encloses(self, other: ModuleCall) -> bool:
        """Whether the other call ran inside this one."""
        return self.start < other.start and other.end < self.end

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor went into this call."""
        return any(same(tensor, item) for item in self.inputs)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One call of an attention function through the registry.

    Attributes:
        key: the implementation's name.
        readable: whether its pattern can be told from its arguments, or it gave its weights.
    """

    path: str
    tick: int
    key: str
    seq_q: int
    seq_k: int
    readable: bool = True


@dataclass(frozen=True, slots=True)
class SoftmaxSite:
    """A softmax or fused attention over [seq, seq] that did not come through the registry."""

    path: str
    tick: int
    function: str


@dataclass(frozen=True, slots=True)
class Trace:
    """All that one probe of `seq` tokens saw."""

    seq: int
    calls: tuple[ModuleCall, ...]
    attention: tuple[AttentionSite, ...]
    softmax: tuple[SoftmaxSite, ...]
    logits: Tensor | None
    last_hidden: tuple[Tensor, ...]

    def inside(self, call: ModuleCall) -> list[ModuleCall]:
        """The calls that ran inside the given one, in order of their start."""
        return [other for other in self.calls if call.encloses(other)]

    def find(self, ticks: Iterable[int], call: ModuleCall) -> list[int]:
        """The ticks that fall inside a call."""
        return [tick for tick in ticks if call.start < tick < call.end]
