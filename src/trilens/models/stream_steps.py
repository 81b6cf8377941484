"""What the parts of a block read of several residual streams, and what they write into them.

A part (attention, a recurrent mixer, an MLP) reads one vector that a module makes of the streams.
What it gives is written into each stream, times a weight of that stream, while the streams may be
mixed among each other. On the probe: behind the part, each token's streams are combinations of its
streams before and of what the part gave, and without that they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.models.stream_form import StreamForm
from trilens.models.trace import ModuleCall, same

__all__ = ["Shown", "StreamStep", "base_of", "rounding", "steps_of"]

_ROUNDINGS = 16
"""Roundings of a tensor's largest entry that a combination of streams may be off by."""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A tensor of a probe at the module that shows it first.

    Attributes:
        tick: when it was seen.
        is_input: whether the module was given it, else it gave it.
    """

    tensor: Tensor
    call: ModuleCall
    index: int
    is_input: bool

    @property
    def tick(self) -> int:
        """When it was seen."""
        return self.call.start if self.is_input else self.call.end


@dataclass(frozen=True, slots=True, eq=False)
class StreamStep:
    """One part of a block with what it reads and writes.

    Attributes:
        before: the streams that it reads, [seq, streams, d_model].
        after: the streams that hold what it gave.
        shown: where a module shows `after`; None for the block's own output.
        part: the module that gave what is written, and which of its outputs that is.
        reader: the module that makes one vector of the streams for it, and which output.
    """

    before: Tensor
    after: Tensor
    shown: Shown | None
    part: tuple[ModuleCall, int]
    reader: tuple[ModuleCall, int] | None


def rounding(tensor: Tensor) -> float:
    """How far a tensor may be from what it is held against, by rounding alone."""
    return _ROUNDINGS * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())


def base_of(block: ModuleCall, out: int) -> int | None:
    """Which of a block's inputs is the streams: the one of its output's shape."""
    like = block.made[out].shape
    return next((i for i, tensor in enumerate(block.read) if tensor.shape == like), None)


def steps_of(
    block: ModuleCall, calls: Sequence[ModuleCall], form: StreamForm, seq: int, base: int, out: int
) -> list[StreamStep] | str:
    """The parts of one block in their order, or why they are not known, in a sentence.

    Args:
        block: the block's call.
        calls: those inside it, in order of their start.
        form: where the streams are in a tensor.
        seq: tokens of the probe.
        base: which of the block's inputs is the streams.
        out: which of its outputs.
    """
    first, last = block.read[base], block.made[out]
    seen = [Shown(first, block, base, is_input=True), *_streams(calls, last)]
    end = Shown(last, block, out, is_input=False)
    steps: list[StreamStep] = []
    state = seen[0]
    for target in (*seen[1:], end):
        if same(target.tensor, state.tensor) or (target is not end and same(target.tensor, last)):
            continue
        step = _step(state, target, calls, form, seq)
        if step is not None:
            steps.append(step if target is not end else _of_block(step))
        elif not _is_added(state, target, calls):
            if target is not end:
                continue
            return f"{block.path}'s streams are not its input's, mixed, plus what a module gives"
        state = target
    return steps


def _of_block(step: StreamStep) -> StreamStep:
    return StreamStep(step.before, step.after, None, step.part, step.reader)


def _streams(calls: Sequence[ModuleCall], like: Tensor) -> Iterator[Shown]:
    """Tensors of the streams' shape that modules of the block are given or give, by their time."""
    found = []
    for call in calls:
        for is_input, tensors in ((True, call.read), (False, call.made)):
            for index, tensor in enumerate(tensors):
                if tensor.shape == like.shape and tensor.is_floating_point():
                    found.append(Shown(tensor, call, index, is_input))
    yield from sorted(found, key=lambda shown: shown.tick)


def _step(
    state: Shown, target: Shown, calls: Sequence[ModuleCall], form: StreamForm, seq: int
) -> StreamStep | None:
    """The part that leads from one state of the streams to the next."""
    before, after = (form.read(each.tensor)[0].double() for each in (state, target))
    allowed = rounding(target.tensor)
    if _gap(before, after, None) <= allowed:
        return None
    for call in calls:
        if call.start < state.tick or call.end > target.tick:
            continue
        for index, tensor in enumerate(call.made):
            if tensor.shape[-1] != form.d_model or tensor.numel() != seq * form.d_model:
                continue
            if not tensor.is_floating_point():
                continue
            part = tensor.reshape(seq, 1, form.d_model).double()
            # Without the streams before it would be no stream, but something made of the part.
            if _gap(part, after, None) > allowed and _gap(before, after, part) <= allowed:
                reader = _reader(state, call, calls, form, seq)
                return StreamStep(before, after, target, (call, index), reader)
    return None


def _gap(before: Tensor, after: Tensor, part: Tensor | None) -> float:
    """How far streams are from combinations of others, and of what a part gave, token by token."""
    basis = before if part is None else torch.cat([before, part], dim=1)
    # Streams may be equal (the first block's are): only what they span counts.
    inverse = torch.linalg.pinv(basis, rtol=1e-6)
    return float((after @ inverse @ basis - after).abs().max())


def _reader(
    state: Shown, part: ModuleCall, calls: Sequence[ModuleCall], form: StreamForm, seq: int
) -> tuple[ModuleCall, int] | None:
    """The module that is given the streams and hands one vector on to the part."""
    for call in calls:
        if call.start < state.tick and call is not state.call:
            continue
        if call.end > part.end or not any(same(state.tensor, t) for t in call.read):
            continue
        for index, tensor in enumerate(call.made):
            if tensor.numel() != seq * form.d_model or tensor.shape[-1] != form.d_model:
                continue
            later = (c for c in calls if c.start > call.end and c.start <= part.end)
            if any(same(tensor, t) for c in later for t in c.read):
                return call, index
    return None


def _is_added(state: Shown, target: Shown, calls: Sequence[ModuleCall]) -> bool:
    """Whether a module's own streams were added: features that are looked up, token by token."""
    added = target.tensor.double() - state.tensor.double()
    allowed = rounding(target.tensor)
    return any(
        tensor.shape == added.shape
        and tensor.is_floating_point()
        and float((tensor.double() - added).abs().max()) <= allowed
        for call in calls
        if state.tick <= call.end <= target.tick
        for tensor in call.made
    )
