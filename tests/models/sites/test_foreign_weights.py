"""Output projections whose weight is a tensor of another library's class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foreign_cases import EightBit, eight_bit
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens import Lens


class NoViews(EightBit):
    """A weight that can be multiplied by and nothing else, as quantizers write them."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.permute.default, torch.ops.aten.transpose.int):
            raise NotImplementedError(f"{func} of {cls.__name__}")
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return NoViews(args[0].codes, args[0].scale)
        plain = [a.dequantize() if isinstance(a, EightBit) else a for a in args]
        return func(*plain, **(kwargs or {}))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_heads_through_a_weight_that_only_multiplies() -> None:
    model = build("llama")
    for block in model.model.layers:
        plain = eight_bit(block.self_attn.o_proj.weight.detach())
        weight = NoViews(plain.codes, plain.scale)
        block.self_attn.o_proj.weight = nn.Parameter(weight, requires_grad=False)
    ids = prompt_ids("llama", 9)[0]
    found = Lens(model).capture(ids, sites=["attn.head_out", "attn.out"])
    for layer in range(4):
        heads = found.sites["attn.head_out", layer]
        assert_near(heads.sum(1), found.sites["attn.out", layer], 1e-5)
