"""Weights to trits {−1, 0, +1}, or four levels, and a few scales, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import DtypeError, ShapeError, UsageError, ValueRangeError
from trilens.results import Shown
from trilens.ternary.granularity import Per, Span, Units, resolve_units
from trilens.ternary.rules.coder import Coded, ScaleDtype, code_units
from trilens.ternary.rules.kernels import kernels_for, parallel_map
from trilens.ternary.rules.numpy_kernels import LANES
from trilens.ternary.rules.rules import FOUR_LEVELS, RuleName, find_rule
from trilens.ternary.weights_view import BLOCK, WeightsLike, view_weights

__all__ = ["PerLayerQuant", "Scale"]

Scale: TypeAlias = "float | NDArray[np.float32]"
"""One number per unit: a float for a single unit, else [rows] or [rows, groups]."""


@dataclass(frozen=True, slots=True, eq=False)
class PerLayerQuant(Shown):
    """A weight tensor as trits: Ŵ = scale · trit, for the tensor, each row or each group of a row.

    Three rules add to that: "asymmetric" an offset, "planes" a second plane of trits, "quad" the
    level 2 and scales of either sign.

    Shapes: rows is the product of all dimensions but the last, groups ceil(cols / group_size)

    Attributes:
        name: What the caller calls the tensor.
        shape: Its shape.
        trits: int8 `[*shape]`, on the CPU; of four levels −1, 0, 1 and 2.
        scale: The factor of the trits. A float where one scale serves all: unrounded (float64)
            unless a `scale_dtype` was asked. Else a float32 array, [rows] or [rows, groups].
        rule: The rule that made it.
        per: What one scale covers: "tensor", "row" or "group".
        group_size: Weights in a group; None unless `per` is "group".
        scale_dtype: What scales and offsets were rounded to before use.
        offset: Like `scale`, what is added to every weight of a unit; None for rules without it.
        second_trits: int8 `[*shape]`, the second plane; None but for "planes".
        second_scale: Like `scale`, its factor.
        was_ternary: The weights were −c, 0 or +c in every unit already; trits and c were kept.
        zeroed_units: Units that were not zero but became it: their scale is 0 in its dtype.
        levels: 3 for trits, 4 where 2 is a level too.
    """

    name: str
    shape: tuple[int, ...]
    trits: Tensor
    scale: Scale
    rule: str
    per: Per
    group_size: int | None = None
    scale_dtype: ScaleDtype | None = None
    offset: Scale | None = None
    second_trits: Tensor | None = None
    second_scale: Scale | None = None
    was_ternary: bool = False
    zeroed_units: int = 0
    levels: int = 3

    @classmethod
    def quantize(
        cls,
        weights: WeightsLike,
        name: str,
        shape: Sequence[int] | None = None,
        rule: RuleName = "absmean",
        group_size: int | None = None,
        *,
        per: Per | None = None,
        scale_dtype: ScaleDtype | None = None,
    ) -> Self:
        """Code a weight tensor.

        By default α = mean|W| and the trit is +1 where w > 0.5α, −1 where w < −0.5α, else 0: a
        weight at exactly 0.5α is 0. Weights that are −c, 0 or +c in all of a unit already keep
        their trits and c, by every rule (the mean would shrink the scale to (1 − sparsity)·c).

        Args:
            weights: Tensor, array or nested list of floats; any strides and device. Not changed.
            name: The tensor's name, which errors repeat.
            shape: The shape of flat weights; None takes theirs.
            rule: One of `rules.RULES`, from the seed's "absmean" to "exact", "quad" and "planes".
            group_size: Weights per scale along the last dimension. Where it does not divide the
                row, the row's last group is shorter (`last_group`).
            per: "tensor" (the default), "row", or "group" (of 128 unless `group_size` is given).
            scale_dtype: Round scales and offsets to this dtype before they are used, so that a
                file of that dtype and `reconstruct` agree bit for bit.

        Raises:
            NonFiniteError: NaN or Inf among the weights; says how many and where the first is.
            ShapeError: empty or 0-D weights, ragged lists, or a `shape` that does not hold them.
            DtypeError: integer, bool, complex or packed weights.
            ValueRangeError: a group size below 1, a scale beyond its dtype, or only scales that
                are 0 in it.
            UsageError: an unknown option, or meta or sparse weights.

        Memory: 1 byte per weight (2 for "planes"), plus up to 50 MB per thread. "exact", and what
        begins with it, needs more for units beyond 2²⁰ weights (`exact.best_survivors`).
        """
        make = find_rule(rule)
        view = view_weights(weights, name, shape)
        units = resolve_units(view.rows, view.cols, per, group_size)
        coded = code_units(
            view,
            units,
            make,
            scale_dtype=scale_dtype,
            n_planes=2 if rule == "planes" else 1,
            has_offset=rule == "asymmetric",
        )
        return cls._of(coded, name, view.shape, units, rule, scale_dtype)

    @classmethod
    def from_trits(
        cls,
        trits: Tensor,
        scale: Scale | Tensor,
        name: str,
        *,
        group_size: int | None = None,
        per: Per | None = None,
        offset: Scale | Tensor | None = None,
        second_trits: Tensor | None = None,
        second_scale: Scale | Tensor | None = None,
        rule: str = "given",
        scale_dtype: ScaleDtype | None = None,
        levels: int = 3,
    ) -> Self:
        """Put together what was coded before, as a file or another library gives it.

        Shapes: trits and second_trits [*shape]; scale, offset and second_scale one number per
        unit, in any shape

        Args:
            trits: −1, 0 and 1; with 4 `levels` also 2.
            scale: see the class.
            name: likewise, and so on.
            group_size: likewise.
            per: likewise.
            offset: likewise.
            second_trits: likewise.
            second_scale: likewise.
            rule: likewise.
            scale_dtype: likewise.
            levels: likewise.

        Raises:
            DtypeError: trits that are not int8.
            ShapeError: a number of scales that is not the number of units, or unlike planes.
            ValueRangeError: trits that are no such level, or a scale that is not finite.
            UsageError: one of `second_trits` and `second_scale` without the other.
        """
        for plane in (trits, second_trits):
            if plane is not None:
                _check_trits(plane, name, tuple(trits.shape), levels)
        if (second_trits is None) != (second_scale is None):
            raise UsageError(f"second plane of {name!r} is incomplete: pass its trits and scale")
        units = resolve_units(math.prod(trits.shape[:-1]), trits.shape[-1], per, group_size)
        return cls(
            name=name,
            shape=tuple(trits.shape),
            trits=trits,
            scale=_given(scale, units, name),
            rule=rule,
            per=units.per,
            group_size=units.group_size,
            scale_dtype=scale_dtype,
            offset=None if offset is None else _given(offset, units, name),
            second_trits=second_trits,
            second_scale=None if second_scale is None else _given(second_scale, units, name),
            levels=levels,
        )

    @classmethod
    def _of(
        cls,
        coded: Coded,
        name: str,
        shape: tuple[int, ...],
        units: Units,
        rule: str,
        scale_dtype: ScaleDtype | None,
    ) -> Self:
        two = len(coded.trits) == 2
        planes = [torch.from_numpy(plane).reshape(shape) for plane in coded.trits]
        return cls(
            name=name,
            shape=shape,
            trits=planes[0],
            scale=_per_unit(coded.scales[:, 0], units),
            rule=rule,
            per=units.per,
            group_size=units.group_size,
            scale_dtype=scale_dtype,
            offset=None if coded.offsets is None else _per_unit(coded.offsets, units),
            second_trits=planes[1] if two else None,
            second_scale=_per_unit(coded.scales[:, 1], units) if two else None,
            was_ternary=coded.was_ternary,
            zeroed_units=coded.zeroed_units,
            levels=4 if rule in FOUR_LEVELS else 3,
        )

    @property
    def units(self) -> Units:
        """How rows are cut into units with a scale each."""
        return Units(math.prod(self.shape[:-1]), self.shape[-1], self.per, self.group_size)

    @property
    def scales(self) -> NDArray[np.float32]:
        """The scales as `reconstruct` uses them, one per unit in row-major order.

        Shapes: [units]
        """
        return np.asarray(self.scale, dtype=np.float32).reshape(-1)

    @property
    def last_group(self) -> int:
        """Weights in the last unit of a row: less than the group size that does not divide it."""
        return self.units.last_length

    @property
    def sparsity(self) -> float:
        """Share of zeros among the trits, of both planes where there are two."""
        planes = [plane for plane in (self.trits, self.second_trits) if plane is not None]
        flat = [plane.reshape(-1).numpy() for plane in planes]
        parts = [each[i : i + BLOCK] for each in flat for i in range(0, each.size, BLOCK)]
        n_codes = sum(plane.numel() for plane in planes)
        return 1.0 - sum(parallel_map(np.count_nonzero, parts)) / n_codes

    def reconstruct(self) -> Tensor:
        """The weights that the trits stand for: float32 `[*shape]`.

        Memory: 4 bytes per weight.
        """
        flat = np.empty(math.prod(self.shape), dtype=np.float32)

        def fill(block: Span) -> None:
            flat[block.start : block.stop] = self._values(block)

        parallel_map(fill, self.units.blocks())
        return torch.from_numpy(flat).reshape(self.shape)

    def mse(self, original: WeightsLike) -> float:
        """Mean of (w − ŵ)² against the weights this was made from.

        Raises: as `quantize` does for the weights it reads.
        """
        return self.energies(original)[0] / math.prod(self.shape)

    def relative_error(self, original: WeightsLike) -> float:
        """The squared relative error ‖W − Ŵ‖² / ‖W‖².

        0 for exact, 1 for nothing left, inf where only ‖W‖ is 0.

        Raises: as `quantize` does for the weights it reads.
        """
        error, energy = self.energies(original)
        if energy == 0:
            return 0.0 if error == 0 else math.inf
        return error / energy

    def energies(self, original: WeightsLike) -> tuple[float, float]:
        """(Σ(w − ŵ)², Σw²), of which the errors of several matrices are made up.

        Raises: as `quantize` does for the weights it reads.
        """
        view = view_weights(original, self.name, self.shape)
        kernels = kernels_for(view.size)

        def of(block: Span) -> tuple[float, float]:
            length = self._factor_length(block)
            with np.errstate(over="ignore", invalid="ignore"):  # told by the sums below
                if length is None:
                    x = view.read(block.start, block.stop)
                    return kernels.squared_sums(x, self._values(block))
                trits = self.trits.reshape(-1)[block.start : block.stop].numpy()
                n_factors = -(-trits.size // length)
                factors = _flat(self.scale)[block.first_unit : block.first_unit + n_factors]
                return kernels.coded_sums(
                    view.stored(block.start, block.stop), trits, factors, length
                )

        found = parallel_map(of, self.units.blocks())
        if not all(math.isfinite(error) and math.isfinite(energy) for error, energy in found):
            raise view.sum_error()
        return math.fsum(error for error, _ in found), math.fsum(energy for _, energy in found)

    def _factor_length(self, block: Span) -> int | None:
        """Weights of a block that share a factor, as `coded_sums` takes them; else None."""
        if self.second_trits is not None or self.offset is not None:
            return None
        size = block.stop - block.start
        width, length = size // block.n_rows, self.units.length
        if width <= length:
            length = width
        elif width % length:
            return None
        return length if length == size or length % LANES == 0 else None

    def _values(self, block: Span) -> NDArray[np.float32]:
        """The reconstructed weights of one block, flat."""
        values = self._plane(self.trits, self.scale, block)
        if self.second_trits is not None and self.second_scale is not None:
            values += self._plane(self.second_trits, self.second_scale, block)
        if self.offset is not None:
            values += self.units.spread(_flat(self.offset), block)
        return values.reshape(-1)

    def _plane(self, trits: Tensor, scale: Scale, block: Span) -> NDArray[np.float32]:
        codes = trits.reshape(-1)[block.start : block.stop].numpy().reshape(block.n_rows, -1)
        factors = self.units.spread(_flat(scale), block)
        values: NDArray[np.float32] = np.multiply(codes, factors, dtype=np.float32)
        return values


def _flat(scale: Scale) -> NDArray[np.float32]:
    return np.asarray(scale, dtype=np.float32).reshape(-1)


def _per_unit(values: NDArray[Any], units: Units) -> Scale:
    if units.count == 1:
        return float(values.reshape(-1)[0])
    return values.astype(np.float32).reshape(units.shape)


def _given(values: Scale | Tensor, units: Units, name: str) -> Scale:
    array = np.asarray(
        values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64
    )
    if array.size != units.count:
        raise ShapeError(
            f"scales of {name!r} are {array.size}, but per {units.per} there are {units.count}"
        )
    if not np.all(np.isfinite(array)):
        raise ValueRangeError(f"scales of {name!r} hold NaN or Inf: every scale must be finite")
    return _per_unit(array, units)


def _check_trits(trits: Tensor, name: str, shape: tuple[int, ...], levels: int) -> None:
    if trits.dtype != torch.int8:
        raise DtypeError(f"trits of {name!r} are {trits.dtype}: pass int8")
    if trits.ndim == 0 or trits.numel() == 0 or tuple(trits.shape) != shape:
        raise ShapeError(
            f"trits of {name!r} have shape {tuple(trits.shape)}: every plane needs the same shape, "
            "of rank 1 or more and not empty"
        )
    low, high = int(trits.min()), int(trits.max())
    if low < -1 or high > levels - 2:
        raise ValueRangeError(
            f"trits of {name!r} reach from {low} to {high}: "
            f"they are {'−1, 0 or 1' if levels == 3 else '−1, 0, 1 or 2'}"
        )
