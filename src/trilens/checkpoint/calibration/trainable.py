"""A ternary matrix as a differentiable function of its scales: trits stay, scales move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate_back
from trilens.ternary.rules.coder import round_scales

__all__ = ["TrainableMatrix"]


class TrainableMatrix:
    """A quantized matrix whose scales have a gradient.

    Args:
        quant: where it begins.
        rotate: the matrix was rotated before it was coded: its weights are rotated back.

    Memory: beside `quant`, 12 bytes for each scale; a call of `weights` 8 bytes for each weight.
    """

    def __init__(self, quant: PerLayerQuant, *, rotate: bool = False) -> None:
        self.quant, self._rotate = quant, rotate
        units = quant.units
        self._grid = (1, 1) if quant.per == "tensor" else (units.rows, units.per_row)
        self._length = units.length if quant.per == "group" else units.cols
        self._cols = units.cols
        self._trits, self._start = [quant.trits], [self._on_grid(quant.scale)]
        if quant.second_trits is not None and quant.second_scale is not None:
            self._trits.append(quant.second_trits)
            self._start.append(self._on_grid(quant.second_scale))
        self._offset = None if quant.offset is None else self._on_grid(quant.offset)
        self.factors = [torch.zeros_like(scale, requires_grad=True) for scale in self._start]

    def weights(self) -> Tensor:
        """Ŵ with a gradient. Shapes: → [rows, cols]."""
        first, *rest = (
            trits * self._spread(scale)
            for trits, scale in zip(self._trits, self._scales(), strict=True)
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
            for trits, values in zip(self._trits, self._scales(), strict=True):
                turned = (values < 0) & (quant.levels == 3)
                signs = torch.where(turned, -1, 1).to(torch.int8)
                flat = (values * signs).reshape(-1).double().numpy()
                rounded = round_scales(
                    flat, quant.scale_dtype or "float32", quant.name, np.arange(units.count)
                )
                planes.append(trits * self._spread(signs))
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

    def _scales(self) -> list[Tensor]:
        return [
            start * (1 + factor) for start, factor in zip(self._start, self.factors, strict=True)
        ]

    def _on_grid(self, values: object) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(self._grid))

    def _spread(self, values: Tensor) -> Tensor:
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self._length, dim=1)[:, : self._cols]
