"""Layers of a ternary checkpoint on their way into a model: with room for what the file holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trilens.checkpoint.coding import CODES_PER_BYTE
from trilens.errors import ConfigError, CorruptFileError
from trilens.ternary.calibrated.rules import levels_of, n_planes_of
from trilens.ternary.codecs.rows import expand_rows, holds_code_3, is_compact, pack_rows
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import PARTS, Packed, TernaryLinear

__all__ = ["Arriving", "dense_like", "experts_like", "packed_like", "two_bit_codes"]


class Arriving(TernaryLinear):
    """A layer with room for compact codes, as long as a checkpoint is read."""

    @property
    def packed(self) -> Packed:
        """The packed weight in two-bit codes; some models look at weights while they load."""
        held = super().packed
        second = None if held.second_codes is None else self._codes("second_codes")
        return replace(held, codes=self._codes("codes"), second_codes=second)

    def arrived(self, path: str) -> TernaryLinear:
        """The layer that computes, with what was read.

        Raises:
            CorruptFileError: a byte that is no five trits.
            ConfigError: the codes were left on disk.
        """
        if self.codes.is_meta:
            raise ConfigError(
                f"{path} is offloaded, but its codes are compact: load the model onto a device "
                'that holds it, or make the checkpoint with storage="two_bit"'
            )
        new = TernaryLinear(
            self.in_features,
            self.out_features,
            bias=False,
            per_row=self.scale.shape[0] > 1,
            group_size=self.group_size,
            transposed=self.transposed,
            rotated=self.rotated,
            levels=self.levels,
            device="meta",
            dtype=self._like.dtype,
        )
        new._like = self._like
        for name in (*PARTS, "bias"):
            setattr(new, name, getattr(self, name))
        for name in ("codes", "second_codes"):
            if getattr(self, name) is not None:
                codes = self._codes(name, f"{name} of {path}")
                setattr(new, name, nn.Parameter(codes, requires_grad=False))
        return new.train(self.training)

    def make_room(self) -> None:
        """Replace the empty two-bit codes by room for what the file holds."""
        for name in ("codes", "second_codes"):
            codes = getattr(self, name)
            if codes is not None:
                width = math.ceil(self.in_features / CODES_PER_BYTE["compact"])
                room = codes.new_zeros((self.out_features, width))
                setattr(self, name, nn.Parameter(room, requires_grad=False))

    def _codes(self, part: str, name: str = "codes") -> Tensor:
        return two_bit_codes(getattr(self, part).data, self.in_features, name, "compact")


def packed_like(
    old: Any, options: Mapping[str, Any], *, compact: bool, rotated: bool
) -> TernaryLinear:
    """An empty packed layer in the place of a dense one.

    Args:
        old: the dense layer.
        options: its rule, per and group size.
        compact: with room for compact codes.
        rotated: of weights and inputs that are rotated.
    """
    transposed = isinstance(old, Conv1D)
    first, second = old.weight.shape
    layer = Arriving if compact else TernaryLinear
    new = layer(
        first if transposed else second,
        second if transposed else first,
        bias=old.bias is not None,
        transposed=transposed,
        rotated=rotated,
        **_coded_as(options),
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    if isinstance(new, Arriving):
        new.make_room()
    new.train(old.training)
    return new


def experts_like(
    held: Tensor, options: Mapping[str, Any], *, transposed: bool, rotated: bool
) -> TernaryExperts:
    """Empty packed experts in the place of a parameter.

    Shapes: held [experts, out, in], or [experts, in, out] if `transposed`

    Args:
        held: the parameter.
        options: its rule, per and group size.
        transposed: see above.
        rotated: of weights and inputs that are rotated.
    """
    n_experts, *sizes = held.shape
    rows, cols = sizes[::-1] if transposed else sizes
    return TernaryExperts(
        n_experts,
        cols,
        rows,
        transposed=transposed,
        rotated=rotated,
        **_coded_as(options),
        device=held.device,
        dtype=held.dtype,
    )


def dense_like(layer: TernaryLinear, dtype: torch.dtype | None) -> nn.Module:
    """The layer that a packed one stands in for, with a dense weight."""
    weight = layer.weight if dtype is None else layer.reconstruct().to(dtype)
    new: nn.Module
    with torch.device("meta"):
        if layer.transposed:
            new = Conv1D(layer.out_features, layer.in_features)
        else:
            new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    names: Iterable[tuple[str, Tensor | None]] = (("weight", weight), ("bias", layer.bias))
    for name, tensor in names:
        if tensor is not None:
            value = tensor.detach().to(weight.dtype).contiguous()
            new.register_parameter(name, nn.Parameter(value))
    return new.train(layer.training)


def two_bit_codes(codes: Tensor, cols: int, name: str, storage: str, levels: int = 3) -> Tensor:
    """Codes as they lie in memory, from those of the file; illegal ones are refused."""
    if storage == "compact":
        if not is_compact(codes):
            raise CorruptFileError(f"{name} holds a byte above 242: five trits make at most that")
        return pack_rows(expand_rows(codes.cpu(), cols)).to(codes.device)
    if levels == 3 and holds_code_3(codes):
        raise CorruptFileError(f"{name} holds the code 3: codes are 0, 1 or 2")
    return codes


def _coded_as(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a packed layer has to know of a rule, per and group size."""
    rule = options["rule"]
    return {
        "per_row": options["per"] != "tensor",
        "group_size": options["group_size"],
        "has_offset": rule == "asymmetric",
        "has_second": n_planes_of(rule) == 2,
        "levels": levels_of(rule),
    }
