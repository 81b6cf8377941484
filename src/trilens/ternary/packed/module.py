"""What layers with packed weights have in common: parts that no cast touches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from trilens.errors import CorruptFileError
from trilens.ternary.codecs.rows import holds_code_3
from trilens.ternary.packed.matrix import PARTS, Packed
from trilens.ternary.rotation import rotate_back

__all__ = ["PackedModule"]

_ZERO_TRITS = 0b01010101  # four codes of the trit 0


class PackedModule(nn.Module):
    """A layer that holds packed matrices as parameters without a gradient.

    `.to(dtype)` and `.half()` change what the layer computes in, never codes and scales.
    """

    codes: nn.Parameter
    scale: nn.Parameter
    offset: nn.Parameter | None
    second_codes: nn.Parameter | None
    second_scale: nn.Parameter | None
    _like: Tensor
    activation_bits: Literal[8] | None
    """Bits that inputs are rounded to; None where they are used as they come."""

    def __init__(
        self,
        lead: tuple[int, ...],
        in_features: int,
        out_features: int,
        *,
        per_row: bool,
        group_size: int | None,
        has_offset: bool,
        has_second: bool,
        transposed: bool,
        rotated: bool,
        levels: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Empty parts, for matrices [*lead, out, in]; a layer that nobody has filled gives zeros.

        The other arguments are those of the layers.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.transposed = transposed
        self.rotated = rotated
        self.levels = levels
        self.activation_bits = None
        n_groups = 1 if group_size is None else math.ceil(in_features / group_size)
        grid = (out_features, n_groups) if per_row or group_size is not None else (1, 1)
        coded = (*lead, out_features, math.ceil(in_features / 4))
        there = {"offset": has_offset, "second_codes": has_second, "second_scale": has_second}
        for name in PARTS:
            part = None
            if there.get(name, True):
                is_coded = name.endswith("codes")
                empty = torch.full(
                    coded if is_coded else (*lead, *grid),
                    _ZERO_TRITS if is_coded else 0,
                    dtype=torch.uint8 if is_coded else torch.float32,
                    device=device,
                )
                part = nn.Parameter(empty, requires_grad=False)
            self.register_parameter(name, part)
        # Follows the module through .to(); remembers the dtype where there is no bias to do so.
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @property
    def packed(self) -> Packed:
        """The packed weights, by reference."""
        parts: dict[str, Any] = self._parameters  # asked for once per call: no detour by name
        return Packed(
            parts["codes"],
            parts["scale"],
            self.in_features,
            self.group_size,
            parts["offset"],
            parts["second_codes"],
            parts["second_scale"],
            self.levels,
        )

    def unrotated(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Matrices of this layer as they were before a rotation. Shapes: → [*lead, out, in]."""
        if not self.rotated:
            return packed.dense(dtype)
        return rotate_back(packed.dense()).to(dtype)

    def check(self, name: str) -> None:
        """Refuse codes and scales that no quantizer makes.

        Args:
            name: what the error calls the layer.

        Raises:
            CorruptFileError: a code 3, or a scale that is not finite.
        """
        for part, tensor in self.packed.parts.items():
            if part.endswith("codes") and self.levels == 3 and holds_code_3(tensor):
                raise CorruptFileError(f"{part} of {name} hold the code 3: codes are 0, 1 or 2")
            if not part.endswith("codes") and not bool(torch.isfinite(tensor).all()):
                raise CorruptFileError(f"{part} of {name} holds NaN or Inf: it must be finite")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._parameters[name] for name in PARTS}
        kept: dict[str, Any] = {name: p.data for name, p in before.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._parameters[name]
            if new is not None and new.dtype != old.dtype:
                self._parameters[name] = nn.Parameter(old.to(new.device), requires_grad=False)
        return self
