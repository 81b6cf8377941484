"""Weights of a matrix by size, in units of their scale, and by the level that each became."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trilens.ternary.quantize import PerLayerQuant

__all__ = ["BINS", "REACH", "LevelHistogram", "LevelSample"]

REACH = 4
"""Scales that the bins cover on either side of 0; weights beyond stand in the outermost."""

BINS = 64
"""Bins of a histogram."""

_FINE = 1024  # bins in which thresholds are looked for
_MOST_WEIGHTS = 1 << 16  # of a matrix: enough for the shape, nothing beside coding it


@dataclass(frozen=True, slots=True)
class LevelHistogram:
    """A sample of a matrix's weights, each divided by the scale of its unit.

    Attributes:
        levels: −1, 0 and 1; of four levels also 2; with two planes those of the first.
        counts: for each level, weights in each of `BINS` bins from −`REACH` to `REACH` scales.
        thresholds: in scales, ascending: where one level gives way to the next; the cut that parts
            the two best, where a calibration let them overlap. None beside a level without weights.
        scale: smallest, median and largest magnitude of the units' scales.
    """

    levels: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    thresholds: tuple[float | None, ...]
    scale: tuple[float, float, float]

    @property
    def n_weights(self) -> int:
        """How many weights were sampled."""
        return sum(map(sum, self.counts))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` gave, also after a way through JSON."""
        low, middle, high = values["scale"]
        return cls(
            levels=tuple(values["levels"]),
            counts=tuple(map(tuple, values["counts"])),
            thresholds=tuple(values["thresholds"]),
            scale=(low, middle, high),
        )


class LevelSample:
    """Collects the weights of one matrix, or of the experts that share a tensor."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] | None = None
        self._scales: list[NDArray[np.float32]] = []

    def add(self, weights: Tensor, quant: PerLayerQuant) -> None:
        """Take rows at even distances of a matrix, with what they became.

        Shapes: weights [rows, cols]
        """
        rows, cols = weights.shape
        taken = slice(None, None, max(1, -(-rows * cols // _MOST_WEIGHTS)))
        values = weights[taken].detach().float().cpu().numpy()
        scales = self._of_rows(quant.scales, quant, taken)
        if quant.offset is not None:
            offsets = np.asarray(quant.offset, dtype=np.float32).reshape(-1)
            values = values - self._of_rows(offsets, quant, taken)
        there = np.broadcast_to(scales != 0, values.shape)
        shares = values[there] / np.broadcast_to(scales, values.shape)[there]
        codes = quant.trits[taken].numpy()[there].astype(np.int64) + 1
        bins = ((shares + REACH) * (_FINE / (2 * REACH))).clip(0, _FINE - 1).astype(np.int64)
        found = np.bincount(codes * _FINE + bins, minlength=quant.levels * _FINE)
        found = found.reshape(quant.levels, _FINE)
        self._counts = found if self._counts is None else self._counts + found
        self._scales.append(np.abs(scales).reshape(-1))

    @staticmethod
    def _of_rows(
        values: NDArray[np.float32], quant: PerLayerQuant, taken: slice
    ) -> NDArray[np.float32]:
        """The units' values for every weight of the rows, [rows, cols] or broadcastable to it."""
        units = quant.units
        if units.per == "tensor":
            return values.reshape(1, 1)
        table = values.reshape(units.rows, units.per_row)[taken]
        return table if units.per_row == 1 else table.repeat(units.length, axis=1)[:, : units.cols]

    def result(self) -> LevelHistogram | None:
        """The histogram; None where every weight was in a unit of scale 0, or none was added."""
        if self._counts is None or not self._counts.any():
            return None
        scales = np.concatenate(self._scales)
        return LevelHistogram(
            levels=tuple(range(-1, len(self._counts) - 1)),
            counts=tuple(
                tuple(map(int, level.reshape(BINS, -1).sum(axis=1))) for level in self._counts
            ),
            thresholds=tuple(
                _cut(low, high) for low, high in zip(self._counts, self._counts[1:], strict=False)
            ),
            scale=(float(scales.min()), float(np.median(scales)), float(scales.max())),
        )


def _cut(low: NDArray[np.int64], high: NDArray[np.int64]) -> float | None:
    """The edge of bins with the most of one level below and of the next above."""
    if not low.any() or not high.any():
        return None
    below = np.concatenate(([0], np.cumsum(low)))
    above = np.concatenate((np.cumsum(high[::-1])[::-1], [0]))
    best = np.flatnonzero(below + above == (below + above).max())
    return float(best[len(best) // 2]) * (2 * REACH / _FINE) - REACH
