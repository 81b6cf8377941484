"""A ternary matrix as a differentiable function of its scales, and of latents behind its trits.

Trits stay until they are freed. Then a latent weight in units of the scale stands behind each, the
trit is the latent rounded, and the gradient passes through the rounding as if it were not there.

Source: straight-through estimator, arXiv 1308.3432; latent weights of ternary layers, BitNet b1.58,
arXiv 2402.17764.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate, rotate_back
from trilens.ternary.rules.coder import round_scales

__all__ = ["TrainableMatrix"]

_NEAR = 0.4  # of the half unit between a trit and its edge
_FAR = 1.25


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
        """Let the trits move; with two planes, whose trits say less each, they stay.

        A latent begins near its trit, on the side where the dense weight lies, and off the edge:
        one step must not turn every trit whose weight was rounded against its size.

        Shapes: dense [rows, cols], as it was before rotation
        """
        if len(self._trits) > 1:
            return
        dense = rotate(dense.float()) if self._rotate else dense.float()
        if self._offset is not None:
            dense = dense - self._spread(self._offset)
        scale = self._spread(self._start[0])
        trits = self._trits[0].float()
        there = torch.where(scale != 0, dense / torch.where(scale == 0, 1.0, scale), trits)
        self.latent = trits + (there - trits).clamp(-_NEAR, _NEAR)
        self.latent.requires_grad_(True)

    def settle(self) -> None:
        """Keep latents where a gradient can still turn their trits."""
        if self.latent is not None:
            with torch.no_grad():
                self.latent.clamp_(-_FAR, self._top - 1 + _FAR)

    def weights(self) -> Tensor:
        """Ŵ with a gradient. Shapes: → [rows, cols]."""
        first, *rest = (
            trits * self._spread(scale)
            for trits, scale in zip(self._moving_trits(), self._scales(), strict=True)
        )
        total = first + rest[0] if rest else first
        total = total if self._offset is None else total + self._spread(self._offset)
        return rotate_back(total) if self._rotate else total

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

    @property
    def _top(self) -> int:
        """The highest level."""
        return 1 if self.quant.levels == 3 else 2

    def _stored_trits(self) -> list[Tensor]:
        if self.latent is None:
            return self._trits
        return [self.latent.detach().round().clamp(-1, self._top).to(torch.int8)]

    def _moving_trits(self) -> list[Tensor]:
        if self.latent is None:
            return self._trits
        # The value is the trit's, the gradient the latent's.
        return [self.latent + (self._stored_trits()[0] - self.latent).detach()]

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
