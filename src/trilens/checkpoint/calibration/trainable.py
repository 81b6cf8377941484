"""A ternary matrix as a differentiable function of its scales, and of latents behind its trits.

Trits stay until they are freed. Then a latent weight in units of the scale stands behind each, the
trit is the latent rounded, and the gradient passes through the rounding as if it were not there.

Source: straight-through estimator, arXiv 1308.3432; latent weights of ternary layers, BitNet b1.58,
arXiv 2402.17764.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate, rotate_back
from trilens.ternary.rules.coder import round_scales

__all__ = ["TrainableMatrix"]

_NEAR = 0.4  # of the half unit between a trit and its edge
_BEYOND = 0.25  # of the lowest and the highest level
_SHORT = 1024  # rows up to here are rotated back by one product: it is faster than by parts


class TrainableMatrix:
    """A quantized matrix whose scales have a gradient.

    Args:
        quant: where it begins.
        rotate: the matrix was rotated before it was coded: its weights are rotated back.
        device: where its weights are computed; the processor unless given.

    Memory: beside `quant`, 12 bytes for each scale; a call of `weights` 8 bytes for each weight;
    4 bytes for each weight whose trit is free, and what the optimizer keeps of it.
    """

    def __init__(
        self, quant: PerLayerQuant, *, rotate: bool = False, device: torch.device | None = None
    ) -> None:
        self.quant, self._rotate, self._device = quant, rotate, device
        units = quant.units
        self._grid = (1, 1) if quant.per == "tensor" else (units.rows, units.per_row)
        self._length = units.length if quant.per == "group" else units.cols
        self._cols = units.cols
        self._trits, self._start = [quant.trits.to(device)], [self._on_grid(quant.scale)]
        if quant.second_trits is not None and quant.second_scale is not None:
            self._trits.append(quant.second_trits.to(device))
            self._start.append(self._on_grid(quant.second_scale))
        self._offset = None if quant.offset is None else self._on_grid(quant.offset)
        self.factors = [torch.zeros_like(scale, requires_grad=True) for scale in self._start]
        self.latent: Tensor | None = None

    def free_trits(self, dense: Tensor) -> None:
        """Let the trits move: a latent weight in units of the (second) scale behind each level.

        A latent begins near its level, on the side where the dense weight lies, and off the edge:
        one step must not turn every trit whose weight was rounded against its size.

        Shapes: dense [rows, cols], as it was before rotation
        """
        dense = rotate(dense.float()) if self._rotate else dense.float()
        if self._offset is not None:
            dense = dense - self._spread(self._offset)
        with torch.no_grad():
            unit, level = self._unit(), self._level(self._trits)
            there = torch.where(unit != 0, dense / torch.where(unit == 0, 1.0, unit), level)
            latent = level + (there - level).clamp(-_NEAR, _NEAR)
            # Levels of two planes may lie nearer to each other than that.
            same = self._level(self._levels_at(latent)) == level
            self.latent = torch.where(same, latent, level)
        self.latent.requires_grad_(True)

    def settle(self, pull: float = 0.0) -> None:
        """After a step: draw latents to their levels, and keep them where gradients turn trits.

        A latent that only gradients move comes to an edge by their noise, and goes to and fro
        across it. One that is drawn back crosses it where gradients agree for long.

        Source: the dampening of arXiv 2203.11086, as a step of its own beside the optimizer's.

        Args:
            pull: the share of the way to its level that a latent is drawn.
        """
        if self.latent is not None:
            with torch.no_grad():
                low, high = self._ends()
                self.latent.copy_(self.latent.clamp(low - _BEYOND, high + _BEYOND))
                if pull:
                    self.latent.lerp_(self._level(self._levels_at(self.latent)), pull)

    def weights(self) -> Tensor:
        """Ŵ with a gradient. Shapes: → [rows, cols]."""
        first, *rest = (
            trits * self._spread(scale)
            for trits, scale in zip(self._stored_trits(), self._scales(), strict=True)
        )
        total = first + rest[0] if rest else first
        if self.latent is not None:
            # The value is the trits', the gradient the latent's.
            total = total + self._unit().detach() * (self.latent - self.latent.detach())
        total = total if self._offset is None else total + self._spread(self._offset)
        if not self._rotate:
            return total
        return (
            rotate_back(total)
            if self._cols > _SHORT
            else total @ _rotation_back(self._cols).to(total.device)
        )

    def result(self) -> PerLayerQuant:
        """The matrix as it is now, its scales rounded; a negative one turns its trits around.

        Of four levels it stays negative.
        """
        quant, units = self.quant, self.quant.units
        planes, scales = [], []
        with torch.no_grad():
            for trits, values in zip(self._stored_trits(), self._scales(), strict=True):
                turned = (values < 0) & (quant.levels == 3)
                signs = torch.where(turned, -1, 1).to(torch.int8)
                flat = (values * signs).reshape(-1).double().cpu().numpy()
                rounded = round_scales(
                    flat, quant.scale_dtype or "float32", quant.name, np.arange(units.count)
                )
                planes.append((trits * self._spread(signs)).cpu())
                scales.append(torch.from_numpy(rounded))
        two = len(planes) == 2
        made = PerLayerQuant.from_trits(
            planes[0],
            scales[0],
            quant.name,
            group_size=quant.group_size,
            per=quant.per,
            offset=quant.offset,
            second_trits=planes[1] if two else None,
            second_scale=scales[1] if two else None,
            rule=quant.rule,
            scale_dtype=quant.scale_dtype,
            levels=quant.levels,
        )
        return replace(made, zeroed_units=quant.zeroed_units)

    def _stored_trits(self) -> list[Tensor]:
        return self._trits if self.latent is None else self._levels_at(self.latent.detach())

    def _levels_at(self, latent: Tensor) -> list[Tensor]:
        """The trits of the level next to each latent."""
        if len(self._trits) == 1:
            top = 1 if self.quant.levels == 3 else 2
            return [latent.round().clamp(-1, top).to(torch.int8)]
        with torch.no_grad():
            ratio = self._ratio()
            best = least = torch.full_like(latent, torch.inf)
            for first in (-1.0, 0.0, 1.0):
                rest = latent - first * ratio
                second = rest.round().clamp(-1, 1)
                gap = (rest - second).abs()
                best = torch.where(gap < least, 3 * first + second, best)
                least = torch.minimum(gap, least)
            upper = (best / 3).round()
            return [upper.to(torch.int8), (best - 3 * upper).to(torch.int8)]

    def _level(self, planes: list[Tensor]) -> Tensor:
        """The value of trits, in units of the latents."""
        if len(planes) == 1:
            return planes[0].float()
        return planes[0] * self._ratio() + planes[1]

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level."""
        if len(self._trits) == 1:
            return torch.tensor(-1.0), torch.tensor(1.0 if self.quant.levels == 3 else 2.0)
        high = self._ratio().abs() + 1
        return -high, high

    def _unit(self) -> Tensor:
        """What a latent counts in: the scale, of two planes the second one's."""
        return self._spread(self._scales()[-1])

    def _ratio(self) -> Tensor:
        """Of the two scales; any that tells all levels apart where the second one is 0."""
        first, second = (scale.detach() for scale in self._scales())
        ratio = torch.where(second == 0, 4.0, first / torch.where(second == 0, 1.0, second))
        return self._spread(ratio)

    def _scales(self) -> list[Tensor]:
        return [
            start * (1 + factor) for start, factor in zip(self._start, self.factors, strict=True)
        ]

    def _on_grid(self, values: object) -> Tensor:
        held = np.array(values, dtype=np.float32).reshape(self._grid)
        return torch.from_numpy(held).to(self._device)

    def _spread(self, values: Tensor) -> Tensor:
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self._length, dim=1)[:, : self._cols]


@cache
def _rotation_back(width: int) -> Tensor:
    """What rows are multiplied by to rotate them back. Shapes: → [width, width]."""
    return rotate_back(torch.eye(width, dtype=torch.float32, device="cpu"))
