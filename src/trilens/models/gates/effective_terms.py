"""The effective attention of one recurrent layer, beside what proves it: the kernel's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilens.caches.patterns.protocol import Pattern

__all__ = ["Effective", "tolerance_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Effective:
    """A pattern of weights W and what the kernel made of them: output = (W·v + skip·v) · gate.

    Shapes
        values, output [batch, units, seq, d]; skip [units]; gate like output

    A unit is a head; where every channel has weights of its own, a unit is a channel and d is 1.

    Attributes:
        pattern: the weights; where units are channels, their mean.
        values: what the recurrence mixes.
        output: what the kernel gave.
        skip: factor of the token's own value that the kernel adds.
        gate: factor of its output that the kernel applies.
        channel: number → the pattern of that channel alone; None where units are heads.
    """

    pattern: Pattern
    values: Tensor
    output: Tensor
    skip: Tensor | None = None
    gate: Tensor | None = None
    channel: Callable[[int], Pattern] | None = None

    @property
    def units(self) -> int:
        """Heads or channels."""
        return self.values.shape[1]

    def mixed(self, positions: Sequence[int], row: int, units: Sequence[int]) -> Tensor:
        """W·v at some positions of one prompt: [units, n, d]."""
        if self.channel is None:
            weights = self.pattern.rows(positions, batch=row)[list(units)]
        else:
            weights = torch.cat([self.channel(u).rows(positions, batch=row) for u in units])
        return weights @ self.values[row, list(units)].to(weights.dtype)

    def difference(
        self, positions: Sequence[int], row: int, units: Sequence[int], length: int
    ) -> float:
        """Largest difference to the kernel's output, relative to that prompt's largest output."""
        return self.deviation(self.mixed(positions, row, units), positions, row, units, length)

    def deviation(
        self, mixed: Tensor, positions: Sequence[int], row: int, units: Sequence[int], length: int
    ) -> float:
        """The same of values [units, n, d] that stand for W·v at these positions."""
        where, which, ours = list(positions), list(units), mixed
        if self.skip is not None:
            own = self.values[row][:, where][which].to(ours.dtype)
            ours = ours + self.skip[which].to(ours.dtype)[:, None, None] * own
        if self.gate is not None:
            ours = ours * self.gate[row][:, where][which].to(ours.dtype)
        theirs = self.output[row][:, where][which].to(ours.dtype)
        largest = float(self.output[row, :, :length].abs().amax())
        if largest == 0:
            return float(ours.abs().amax())
        return float((ours - theirs).abs().amax()) / largest


def tolerance_of(effective: Effective) -> float:
    """Relative difference to the kernel's output that is rounding."""
    # PROMOTE: a kernel that rounds to half precision can't agree to better than its own rounding;
    # one whose inputs are half may round inside and still give float32.
    dtypes = effective.values.dtype, effective.output.dtype
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return 1e-5 if coarsest <= torch.finfo(torch.float32).eps else 4 * coarsest
