"""What one block leaves for later ones: which tensors, of which shape.

A block hands on what it returns and what it writes into containers that it was given. Of that a
later block, or the head, needs some: which, is measured. All of it is numbered: the tensors of what
was returned, in order, then those of what was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trilens.checkpoint.calibration.nest import Writes, containers, leaves, replaced, written
from trilens.errors import AnatomyError

__all__ = ["Axes", "Carried", "Form", "Key", "Made", "axes_of", "snapshot"]

Key = tuple[int, int]
"""The call of a block, and the tensor's number among what it hands on."""

Carried = Mapping[Key, Tensor]
"""What stands between two blocks: all that the rest of the model needs of those before."""


@dataclass(frozen=True, slots=True)
class Made:
    """What one call of a block handed on."""

    returned: Any
    writes: Writes

    @classmethod
    def of(cls, returned: Any, before: Mapping[Any, dict[Any, Any]], nest: Any) -> Made:
        """What it returned, and what it wrote into the nest that it was given.

        Args:
            returned: by the call.
            before: `snapshot` of the nest, taken before it.
            nest: its arguments.
        """
        return cls(returned, written(before, nest))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those returned, in order, then those written."""
        return tuple(t for part in self._parts for _, t in leaves(part))

    def put(self, nest: Any, tensors: Sequence[Tensor]) -> Any:
        """Hand on other tensors in the same form: write into the nest, and give what to return."""
        returned, writes = self._parts
        paths = [path for path, _ in leaves(returned)]
        by = dict(zip(paths, tensors, strict=False))
        rest = [path for path, _ in leaves(writes)]
        self.writes.put(nest, dict(zip(rest, tensors[len(paths) :], strict=True)))
        return replaced(returned, by)

    @property
    def _parts(self) -> tuple[Any, Any]:
        return self.returned, self.writes.items


def snapshot(nest: Any) -> dict[Any, dict[Any, Any]]:
    """The items of every container of a nest, as they are now."""
    return {
        path: dict(held.items() if isinstance(held, Mapping) else enumerate(held))
        for path, held in containers(nest)
    }


@dataclass(frozen=True, slots=True)
class Axes:
    """How a tensor's shape follows from the batch's.

    Attributes:
        factors: For each axis a constant, and whether batch and seq are factors of its size.
        dtype: Its dtype.
    """

    factors: tuple[tuple[int, bool, bool], ...]
    dtype: torch.dtype

    def shape(self, batch: int, seq: int) -> tuple[int, ...]:
        """The shape for a batch of so many rows of so many tokens."""
        return tuple(c * (batch if b else 1) * (seq if s else 1) for c, b, s in self.factors)

    def row_numel(self, seq: int) -> int:
        """Numbers in one row."""
        return prod(self.shape(1, seq))

    def to_rows(self, tensor: Tensor) -> Tensor:
        """Shapes: → [batch, numbers of a row]; without an axis of rows, [1, …]."""
        axis = self._rows
        if axis is not None:
            tensor = tensor.movedim(axis, 0)
            return tensor.reshape(tensor.shape[0], -1)
        return tensor.reshape(1, -1)

    def from_rows(self, rows: Tensor, seq: int) -> Tensor:
        """The inverse of `to_rows`."""
        axis, shape = self._rows, list(self.shape(len(rows), seq))
        if axis is None:
            return rows[0].reshape(shape)
        front = [shape.pop(axis), *shape]
        return rows.reshape(front).movedim(0, axis)

    @property
    def _rows(self) -> int | None:
        return next((i for i, f in enumerate(self.factors) if f[1]), None)


def axes_of(name: str, shapes: Sequence[tuple[tuple[int, int], Tensor]]) -> Axes:
    """Read a tensor's axes off two runs of unlike size.

    Args:
        name: whose tensor it is, for messages.
        shapes: for each run its (batch, seq), and the tensor.

    Raises:
        AnatomyError: a size that is no product of batch, seq and a constant, or rows that are not
            an axis of their own.
    """
    ((b0, s0), one), ((b1, s1), other) = shapes
    found = []
    for n0, n1 in zip(one.shape, other.shape, strict=False):
        for rows, tokens in ((False, False), (True, False), (False, True), (True, True)):
            unit0 = (b0 if rows else 1) * (s0 if tokens else 1)
            unit1 = (b1 if rows else 1) * (s1 if tokens else 1)
            if n0 % unit0 == 0 and n1 == n0 // unit0 * unit1:
                found.append((n0 // unit0, rows, tokens))
                break
    rows_alone = [f for f in found if f[1]] in ([], [(1, True, False)])
    if one.dim() != other.dim() or len(found) != one.dim() or not rows_alone:
        raise AnatomyError(
            f"{name} hands on a tensor {list(one.shape)} for {b0} × {s0} tokens and "
            f"{list(other.shape)} for {b1} × {s1}: its rows are no axis that can be told"
        )
    return Axes(tuple(found), one.dtype)


@dataclass(frozen=True, slots=True)
class Form:
    """What stands between two blocks, tensor by tensor."""

    axes: tuple[tuple[Key, Axes], ...]

    def row_numel(self, seq: int) -> int:
        """Numbers in one row of all tensors together."""
        return sum(axes.row_numel(seq) for _, axes in self.axes)

    def to_rows(self, carried: Carried, batch: int, seq: int) -> Tensor:
        """Shapes: → float32 [batch, numbers of a row].

        Raises:
            AnatomyError: a tensor of another shape than its axes tell.
        """
        parts = []
        for key, axes in self.axes:
            if tuple(carried[key].shape) != axes.shape(batch, seq):
                raise AnatomyError(
                    f"block {key[0]} hands on a tensor {list(carried[key].shape)} for {batch} × "
                    f"{seq} tokens, where {list(axes.shape(batch, seq))} was told from a probe: "
                    "calibrate with another length"
                )
            rows = axes.to_rows(carried[key].detach()).float()
            parts.append(rows.expand(batch, -1))
        return torch.cat(parts, dim=1) if parts else torch.zeros(batch, 0)

    def from_rows(self, rows: Tensor, seq: int) -> dict[Key, Tensor]:
        """The inverse of `to_rows`."""
        sizes = [axes.row_numel(seq) for _, axes in self.axes]
        found = {}
        for (key, axes), part in zip(self.axes, torch.split(rows, sizes, dim=1), strict=True):
            tensor = axes.from_rows(part, seq)
            found[key] = tensor if axes.dtype.is_floating_point else tensor.to(axes.dtype)
        return found
