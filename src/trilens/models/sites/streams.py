"""One block of a probe: its streams, found again by their bits, and the taps that show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trilens.models.sites.site import Tap
from trilens.models.sites.sums import is_rowwise
from trilens.models.trace import ModuleCall, ScaledCall, SumCall, Trace

__all__ = ["BlockStreams", "Maker", "is_norm_like"]

_ROWS, _COLUMNS = 3, 5


@dataclass(frozen=True, slots=True, eq=False)
class Maker:
    """What gave a stream: a module's output, a sum, or a product with factors of all tokens.

    Attributes:
        tick: when, on the clock of the trace.
        index: which of the module's outputs.
    """

    kind: Literal["output", "sum", "scaled"]
    tick: int
    tensor: Tensor
    call: ModuleCall | SumCall | ScaledCall
    index: int = 0


def is_norm_like(call: ModuleCall) -> bool:
    """Whether a module maps each stream to one, by weights per channel or none: norms, dropout."""
    if len(call.outputs) != 1 or any(True for _ in call.module.children()):
        return False
    floats = [tensor for tensor in call.inputs if tensor.is_floating_point()]
    fits = len(floats) == 1 and floats[0].shape == call.outputs[0].shape
    return fits and all(p.dim() <= 1 for p in call.module.parameters(recurse=False))


class BlockStreams:
    """The streams of one block's run: tensors with `d_model` numbers per token.

    Attributes:
        block: the block's call.
        calls: the calls inside it, in order of their start.
        sums: its sums of streams, in order.
    """

    def __init__(self, trace: Trace, block: ModuleCall, d_model: int) -> None:
        self.seq = trace.seq
        self.d_model = d_model
        self.block = block
        self.calls = trace.inside(block)
        self.sums = [s for s in trace.sums if self._mine(s.tick) and self.is_stream(s.result)]
        scaled = [s for s in trace.scaled if self._mine(s.tick) and self.is_stream(s.result)]
        self._makers: dict[tuple[float, ...], list[Maker]] = {}
        for call in self.calls:
            for index, tensor in enumerate(call.made):
                if self.is_stream(tensor):
                    self._add(Maker("output", call.end, tensor, call, index))
        for each in self.sums:
            self._add(Maker("sum", each.tick, each.result, each))
        for product in scaled:
            self._add(Maker("scaled", product.tick, product.result, product))

    def _mine(self, tick: int) -> bool:
        return self.block.start < tick < self.block.end

    def _add(self, maker: Maker) -> None:
        self._makers.setdefault(self._key(maker.tensor), []).append(maker)

    def is_stream(self, tensor: Tensor) -> bool:
        """Whether a tensor has d_model numbers for each token of the probe."""
        return is_rowwise(tensor, self.seq) and tensor.shape[-1] == self.d_model

    def rows(self, tensor: Tensor) -> Tensor:
        """A stream as [seq, d_model]."""
        return tensor.reshape(self.seq, self.d_model)

    def _key(self, tensor: Tensor) -> tuple[float, ...]:
        down, across = max(1, self.seq // _ROWS), max(1, self.d_model // _COLUMNS)
        # PROMOTE: a stream that was cast to a wider dtype has the same numbers.
        sample = self.rows(tensor)[::down, ::across].flatten()
        return tuple(sample.double().tolist())

    def equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether two streams hold the same numbers, whatever their axes and dtype."""
        if a is b:
            return True
        wide = torch.promote_types(a.dtype, b.dtype)
        return bool(torch.equal(self.rows(a).to(wide), self.rows(b).to(wide)))

    def makers(self, tensor: Tensor, before: int) -> Iterator[Maker]:
        """What gave these numbers before a tick, in the order of the calls."""
        for maker in self._makers.get(self._key(tensor), ()):
            if maker.tick < before and self.equal(maker.tensor, tensor):
                yield maker

    def shown(self, tensor: Tensor, before: int) -> tuple[ModuleCall, int] | None:
        """The outermost module that gave these numbers, and which of its outputs they are."""
        found = [
            (maker.call, maker.index)
            for maker in self.makers(tensor, before)
            if isinstance(maker.call, ModuleCall)
        ]
        return min(found, key=lambda item: item[0].start, default=None)

    def order(self, call: ModuleCall) -> int:
        """Which of the block's calls of its module a call is."""
        return sum(c.module is call.module and c.start < call.start for c in self.calls)

    def output_tap(self, call: ModuleCall, index: int = 0) -> tuple[Tap, bool]:
        """The tap at a module's output, and whether the model writes into it later."""
        written = call.made[index] is not call.outputs[index]
        return Tap("output", call.module, index, self.order(call)), written

    def input_tap(self, call: ModuleCall, index: int = 0) -> tuple[Tap, bool]:
        """The tap at a module's input, and whether the model writes into it later."""
        written = call.read[index] is not call.inputs[index]
        return Tap("input", call.module, index, self.order(call)), written

    def sum_tap(self, call: SumCall, part: str = "") -> tuple[Tap, bool]:
        """The tap at a sum: its result, or its "left" or "right" operand."""
        around = [self.block, *(c for c in self.calls if c.path == call.path)]
        owner = max(
            (c for c in around if c.path == call.path and c.start < call.tick < c.end),
            key=lambda c: c.start,
        )
        earlier = [s for s in self.sums if s.path == call.path and s.tick < call.tick]
        # What a sum gives may always be written into: the next one may be in place.
        return Tap("sum", owner.module, 0, len(earlier), part), True
