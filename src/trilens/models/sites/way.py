"""The way of the residual stream through a block, explained backward from its output.

The output is the block's input after a number of steps: a part was added, a norm was applied
(post-norm blocks), or it was multiplied by factors that are the same for all tokens. Each part is
what attention, a recurrent mixer, an MLP or something else gave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trilens.models.sites.streams import BlockStreams, is_norm_like
from trilens.models.trace import ModuleCall, ScaledCall, SumCall

__all__ = ["Piece", "Step", "pieces_of", "way_of"]

_DEEP = 12


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of the stream.

    Attributes:
        result: the stream after it.
        before: the stream before it.
        part: what a sum added; None for other steps.
        side: which operand of the sum the part is.
    """

    kind: Literal["sum", "norm", "scale"]
    tick: int
    before: Tensor
    result: Tensor
    call: ModuleCall | SumCall | ScaledCall
    part: Tensor | None = None
    side: Literal["left", "right", ""] = ""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One summand of what was added to the stream.

    Attributes:
        tensor: the summand, after norms and factors.
        tick: when it was added to something.
        cores: the modules that gave it, before norms and factors.
        sum: the sum that it is an operand of, and `side` which one.
    """

    tensor: Tensor
    tick: int
    cores: tuple[tuple[ModuleCall, int], ...]
    sum: SumCall
    side: Literal["left", "right"]


def way_of(
    streams: BlockStreams, target: Tensor, base: Tensor, before: int, deep: int = _DEEP
) -> tuple[Step, ...] | None:
    """The steps that lead from one stream to another, or None."""
    if streams.equal(target, base):
        return ()
    if not deep:
        return None
    makers = list(streams.makers(target, before))
    for maker in makers:
        if not isinstance(maker.call, SumCall):
            continue
        sides: list[tuple[Tensor, Tensor, Literal["left", "right"]]] = [
            (maker.call.left, maker.call.right, "right"),
            (maker.call.right, maker.call.left, "left"),
        ]
        # A part that is a norm of the stream does not make it the stream.
        sides.sort(key=lambda side: not streams.equal(side[0], base))
        for stream, part, side in sides:
            way = way_of(streams, stream, base, maker.tick, deep - 1)
            if way is not None:
                return (*way, Step("sum", maker.tick, stream, target, maker.call, part, side))
    for maker in makers:
        call = maker.call
        if isinstance(call, ScaledCall):
            way = way_of(streams, call.x, base, maker.tick, deep - 1)
            if way is not None:
                return (*way, Step("scale", maker.tick, call.x, target, call))
        elif isinstance(call, ModuleCall) and is_norm_like(call):
            x = _floating(call)
            if streams.equal(x, target):
                continue
            way = way_of(streams, x, base, call.start, deep - 1)
            if way is not None:
                return (*way, Step("norm", maker.tick, x, target, call))
    return None


def pieces_of(streams: BlockStreams, step: Step) -> list[Piece] | None:
    """The summands of what a step added; None where one of them comes from nowhere known."""
    if step.part is None or not isinstance(step.call, SumCall) or not step.side:
        return []
    return _pieces(streams, step.part, step.call, step.side)


def _pieces(
    streams: BlockStreams, tensor: Tensor, add: SumCall, side: Literal["left", "right"]
) -> list[Piece] | None:
    cores = _cores(streams, tensor, add.tick, _DEEP)
    if streams.shown(tensor, add.tick) is None:
        for inner in _sums(streams, tensor, add.tick)[:1]:
            left = _pieces(streams, inner.left, inner, "left")
            right = _pieces(streams, inner.right, inner, "right")
            return None if left is None or right is None else [*left, *right]
    return [Piece(tensor, add.tick, tuple(cores), add, side)] if cores else None


def _sums(streams: BlockStreams, tensor: Tensor, before: int) -> list[SumCall]:
    return [m.call for m in streams.makers(tensor, before) if isinstance(m.call, SumCall)]


def _cores(
    streams: BlockStreams, tensor: Tensor, before: int, deep: int
) -> list[tuple[ModuleCall, int]]:
    """The modules that gave a summand, seen through norms, factors and sums."""
    if not deep:
        return []
    shown = streams.shown(tensor, before)
    if shown is not None:
        call, _ = shown
        if not is_norm_like(call):
            return [shown]
        # A norm after a part, or a dropout that changes nothing.
        return _cores(streams, _floating(call), call.start, deep - 1) or [shown]
    for maker in streams.makers(tensor, before):
        if isinstance(maker.call, ScaledCall):
            return _cores(streams, maker.call.x, maker.tick, deep - 1)
    for inner in _sums(streams, tensor, before):
        left = _cores(streams, inner.left, inner.tick, deep - 1)
        right = _cores(streams, inner.right, inner.tick, deep - 1)
        return [*left, *right] if left and right else []
    return []


def _floating(call: ModuleCall) -> Tensor:
    return next(tensor for tensor in call.read if tensor.is_floating_point())
