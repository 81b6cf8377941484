"""How the tensor that blocks hand on holds the residual: one stream of d_model numbers, or several.

Several streams stand in an axis of their own, after the tokens (hyper-connections) or before the
batch (AltUp), or side by side in one wide axis. Which it is is read off a probe: the axes by their
sizes, the order inside a wide axis by the first block, which is given one embedding for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["StreamForm", "form_of", "holds_one", "holds_several"]


@dataclass(frozen=True, slots=True)
class StreamForm:
    """Where the streams are in the tensor that a block hands on.

    Attributes:
        kind: "single": [batch, seq, d_model]; "inner": [batch, seq, streams, d_model]; "leading":
            [streams, batch, seq, d_model]; "wide": [batch, seq, streams · d_model].
        n_streams: how many there are.
        d_model: width of one.
        batch_first: whether the batch stands before the tokens.
    """

    kind: Literal["single", "inner", "leading", "wide"]
    n_streams: int
    d_model: int
    batch_first: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of one token: (d_model,), or (streams, d_model)."""
        return (self.d_model,) if self.kind == "single" else (self.n_streams, self.d_model)

    def read(self, tensor: Tensor) -> Tensor:
        """What a block hands on as [batch, seq, *shape], by reference where the axes allow it."""
        if self.kind == "leading":
            tensor = tensor.movedim(0, 2)
        if not self.batch_first:
            tensor = tensor.transpose(0, 1)
        return tensor.reshape(*tensor.shape[:-1], *self.shape) if self.kind == "wide" else tensor

    def write(self, values: Tensor) -> Tensor:
        """[batch, seq, *shape] as a block hands it on."""
        if self.kind == "wide":
            values = values.flatten(-2)
        if not self.batch_first:
            values = values.transpose(0, 1)
        return values.movedim(2, 0) if self.kind == "leading" else values


def holds_one(tensor: Tensor, seq: int) -> bool:
    """Whether a tensor of a probe is one stream, or several side by side: [1, seq, width]."""
    return tensor.is_floating_point() and tensor.dim() == 3 and sorted(tensor.shape[:2]) == [1, seq]


def holds_several(tensor: Tensor, seq: int) -> bool:
    """Whether a tensor of a probe has an axis of streams: [1, seq, streams, d_model] and alike."""
    if not tensor.is_floating_point() or tensor.dim() != 4:
        return False
    inner, leading = tensor.shape[:2], tensor.shape[1:3]
    return any(sorted(axes) == [1, seq] for axes in (inner, leading))


def form_of(tensor: Tensor, seq: int, width: int | None, first: Tensor | None) -> StreamForm | str:
    """The form of what the blocks of a probe hand on, or why there is none, in a sentence.

    Args:
        tensor: of the last block.
        seq: tokens of the probe.
        width: the model's hidden size, None where its config names none.
        first: what the first block is given.
    """
    size = tensor.shape[-1]
    if tensor.dim() == 4:
        inner = sorted(tensor.shape[:2]) == [1, seq]
        axes = tensor.shape[:2] if inner else tensor.shape[1:3]
        count = tensor.shape[2] if inner else tensor.shape[0]
        return StreamForm("inner" if inner else "leading", count, size, axes[1] == seq)
    batch_first = tensor.shape[1] == seq
    if width is None or size == width or size % width:
        return StreamForm("single", 1, size, batch_first)
    count = size // width
    parts = None if first is None else first.reshape(*first.shape[:-1], count, width)
    if parts is None or not torch.equal(parts, parts[..., :1, :].expand_as(parts)):
        return (
            f"{count} × the model's hidden size {width}, but the first block is not given "
            f"{count} copies of one embedding, so that where each stream stands is not known"
        )
    return StreamForm("wide", count, width, batch_first)
