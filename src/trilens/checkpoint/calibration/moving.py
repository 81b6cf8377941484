"""A ternary matrix as a differentiable function of its scales, and where wanted of its trits.

Scales move by factors. Trits move with hidden weights: each weight takes the level of its unit that
is nearest to its hidden one, and the gradient passes through that choice as if it were not there.

Source: the straight-through estimator, arXiv 1308.3432; its use on single blocks, EfficientQAT,
arXiv 2407.11062.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilens.ternary.engine import round_scales
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["MovingMatrix"]

_INSIDE = 0.45  # of a scale: how far from its level a hidden weight begins at most
_BEYOND = 1.0  # of a scale: hidden weights that far outside the levels do not go further out


class MovingMatrix:
    """A quantized matrix, its scales and trits as tensors with a gradient.

    Args:
        quant: where it begins; exactly.
        dense: float32 [rows, cols], what the hidden weights are near; None where trits stay.
    """

    def __init__(self, quant: PerLayerQuant, dense: Tensor | None) -> None:
        self.quant = quant
        units = quant.units
        self._grid = (1, 1) if quant.per == "tensor" else (units.rows, units.per_row)
        self._length = units.length if quant.per == "group" else units.cols
        self._cols = units.cols
        self._trits = [quant.trits.float()]
        self._start = [self._on_grid(quant.scale)]
        if quant.second_trits is not None and quant.second_scale is not None:
            self._trits.append(quant.second_trits.float())
            self._start.append(self._on_grid(quant.second_scale))
        self._offset = None if quant.offset is None else self._on_grid(quant.offset)
        self.factors = [torch.zeros_like(scale, requires_grad=True) for scale in self._start]
        self.steps: Tensor | None = None
        if dense is not None and quant.offset is None:
            self._size = self._spread(self._start[-1]).clamp_min(1e-12)
            level = self._levels(self._trits, self._start)
            near = _INSIDE * self._size
            self._base = level + torch.clamp(dense - level, -near, near)
            self.steps = torch.zeros_like(self._base, requires_grad=True)

    def weights(self) -> Tensor:
        """Ŵ with a gradient. Shapes: → [rows, cols]."""
        spread = [self._spread(scale) for scale in self._scales()]
        if self.steps is not None:
            found: Any = _Nearest.apply(self._hidden(), *spread)  # type: ignore[no-untyped-call]
            assert isinstance(found, Tensor)
            return found
        total = self._levels(self._trits, self._scales())
        return total if self._offset is None else total + self._spread(self._offset)

    def result(self) -> PerLayerQuant:
        """The matrix as it is now, its scales rounded."""
        with torch.no_grad():
            scales = self._scales()
            planes = self._trits
            if self.steps is not None:
                planes = _nearest(self._hidden(), [self._spread(scale) for scale in scales])
        quant, units = self.quant, self.quant.units
        new_planes, new_scales = [], []
        for plane, values in zip(planes, scales, strict=True):
            signs = torch.where(values < 0, -1.0, 1.0)  # a negative scale turns its trits around
            flat = values.detach().abs().reshape(-1).double().numpy()
            rounded = round_scales(
                flat, quant.scale_dtype or "float32", quant.name, np.arange(units.count)
            )
            new_planes.append((plane * self._spread(signs)).to(torch.int8))
            new_scales.append(torch.from_numpy(rounded))
        two = len(new_planes) == 2
        made = PerLayerQuant.from_trits(
            new_planes[0],
            new_scales[0],
            quant.name,
            group_size=quant.group_size,
            per=quant.per,
            offset=quant.offset,
            second_trits=new_planes[1] if two else None,
            second_scale=new_scales[1] if two else None,
            rule=quant.rule,
            scale_dtype=quant.scale_dtype,
        )
        return replace(made, zeroed_units=quant.zeroed_units)

    def _scales(self) -> list[Tensor]:
        return [
            start * (1 + factor) for start, factor in zip(self._start, self.factors, strict=True)
        ]

    def _hidden(self) -> Tensor:
        assert self.steps is not None
        return self._base + self._size * self.steps

    def _levels(self, trits: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
        first, *rest = (
            plane * self._spread(scale) for plane, scale in zip(trits, scales, strict=True)
        )
        return first + rest[0] if rest else first

    def _on_grid(self, values: object) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(self._grid))

    def _spread(self, values: Tensor) -> Tensor:
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self._length, dim=1)[:, : self._cols]


def _nearest(hidden: Tensor, scales: Sequence[Tensor]) -> list[Tensor]:
    """The trits of the level nearest to each hidden weight, plane by plane."""
    if len(scales) == 1:
        return [_trit(hidden, scales[0])]
    first, second = scales
    best = torch.full_like(hidden, torch.inf)
    one, other = torch.zeros_like(hidden), torch.zeros_like(hidden)
    for trit in (-1.0, 0.0, 1.0):
        rest = hidden - trit * first
        found = _trit(rest, second)
        distance = (rest - found * second).abs()
        better = distance < best
        best = torch.where(better, distance, best)
        one = torch.where(better, trit, one)
        other = torch.where(better, found, other)
    return [one, other]


def _trit(values: Tensor, scale: Tensor) -> Tensor:
    half = 0.5 * scale.abs()
    found = (values > half).float() - (values < -half).float()
    return torch.where(scale < 0, -found, found)


class _Nearest(torch.autograd.Function):
    """The nearest level; the gradient of a hidden weight is its level's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *scales: Tensor) -> Tensor:
        planes = _nearest(hidden, scales)
        reach = sum(scale.abs() for scale in scales) + _BEYOND * scales[-1].abs()
        ctx.save_for_backward(hidden.abs() <= reach, *planes)
        ctx.shapes = [scale.shape for scale in scales]
        level = planes[0] * scales[0]
        return level + planes[1] * scales[1] if len(planes) == 2 else level

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        inside, *planes = ctx.saved_tensors
        to_scales = (
            (grad * plane).sum_to_size(shape)
            for plane, shape in zip(planes, ctx.shapes, strict=True)
        )
        return (grad * inside, *to_scales)
