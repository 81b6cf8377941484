"""`Packed`: the few tensors of a packed matrix, and the dense one that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from trilens.errors import ShapeError
from trilens.ternary.codecs.rows import pack_rows, unpack_rows
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["PARTS", "Packed", "by_address", "nothing_watches"]

PARTS = ("codes", "scale", "offset", "second_codes", "second_scale")
"""The tensors of a packed matrix; the last three only for the rules that make them."""
_PLAIN = frozenset({Tensor, torch.nn.Parameter})  # subclasses may hold no memory of their own


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Packed matrices: Ŵ = scale · trits (+ second_scale · second_trits) (+ offset).

    Shapes: lead are the leading dimensions, none for one matrix, one for experts

    Attributes:
        codes: uint8 [*lead, rows, ceil(cols / 4)].
        scale: [*lead, rows or 1, groups or 1].
        cols: Weights in a row.
        group_size: Weights that share a scale in a row; None where a row has one scale.
        offset: As `scale`, or None.
        second_codes: As `codes`, or None.
        second_scale: As `scale`, or None.
        levels: 3 where it is known that no code is 3, else 4.
    """

    codes: Tensor
    scale: Tensor
    cols: int
    group_size: int | None = None
    offset: Tensor | None = None
    second_codes: Tensor | None = None
    second_scale: Tensor | None = None
    levels: int = 4

    @classmethod
    def of(cls, quant: PerLayerQuant) -> Self:
        """Pack one quantized matrix.

        Raises:
            ShapeError: not a matrix.
        """
        if len(quant.shape) != 2:
            raise ShapeError(f"weights {quant.name!r} have shape {quant.shape}: pass a matrix")
        units = quant.units
        grid = (1, 1) if quant.per == "tensor" else (units.rows, units.per_row)

        def scales(values: Any) -> Tensor | None:
            if values is None:
                return None
            return torch.from_numpy(np.array(values, dtype=np.float32).reshape(grid))

        return cls(
            codes=pack_rows(quant.trits, quant.levels),
            scale=torch.from_numpy(quant.scales.reshape(grid).copy()),
            cols=quant.shape[1],
            group_size=quant.group_size,
            offset=scales(quant.offset),
            second_codes=None if quant.second_trits is None else pack_rows(quant.second_trits),
            second_scale=scales(quant.second_scale),
            levels=quant.levels,
        )

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names in `PARTS`."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def size_bytes(self) -> int:
        """Bytes of all the parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def check_width(self, x: Tensor) -> None:
        """Refuse inputs of another width: by their addresses, others would be read.

        Raises:
            ShapeError: x is not [..., cols].
        """
        if x.shape[-1:] != (self.cols,):
            raise ShapeError(
                f"inputs have shape {tuple(x.shape)}: the layer takes [..., {self.cols}]"
            )

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrices, rounded once to `dtype`.

        Shapes: → [*lead, rows, cols]

        Memory: the matrices in `dtype`, and up to 2 bytes for each weight on the way.
        """
        if self.offset is None and self.second_codes is None:
            # Rounding commutes with a factor of −1, 0 or 1: no detour over float32.
            return self._plane(self.codes, self.scale, dtype)
        # PROMOTE: a sum of two terms in bfloat16 would be rounded three times instead of once
        values = self._plane(self.codes, self.scale, torch.float32)
        if self.second_codes is not None and self.second_scale is not None:
            values += self._plane(self.second_codes, self.second_scale, torch.float32)
        if self.offset is not None:
            values += self._spread(self.offset)
        return values.to(dtype)

    def rows(self, start: int, stop: int) -> Self:
        """Some rows, by reference. For one matrix.

        Shapes: [rows, cols] → [stop − start, cols]
        """

        def part(name: str, tensor: Tensor) -> Tensor:
            shared = not name.endswith("codes") and tensor.shape[0] == 1
            return tensor if shared else tensor[start:stop]

        parts: dict[str, Any] = {name: part(name, tensor) for name, tensor in self.parts.items()}
        return replace(self, **parts)

    def lead(self, index: Any) -> Self:
        """One matrix of several by reference, or some.

        Args:
            index: of the first dimension, as a tensor takes it.
        """
        parts: dict[str, Any] = {name: tensor[index] for name, tensor in self.parts.items()}
        return replace(self, **parts)

    def _plane(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        trits = unpack_rows(codes, self.cols, dtype)
        return trits.mul_(self._spread(scale.to(dtype)))

    def _spread(self, values: Tensor) -> Tensor:
        """One number per group to one per weight, where rows have more than one group."""
        if self.group_size is None or values.shape[-1] == 1:
            return values
        return values.repeat_interleave(self.group_size, dim=-1)[..., : self.cols]


def by_address(x: Tensor, packed: Packed) -> bool:
    """Whether compiled code may read inputs and codes in this process's memory, now."""
    return (
        x.is_cpu
        and packed.codes.is_cpu
        and type(x) in _PLAIN
        and type(packed.codes) in _PLAIN
        and nothing_watches()
    )


def nothing_watches() -> bool:
    """Whether no tracer, transform or mode of torch wants to see the operations of a product."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )
