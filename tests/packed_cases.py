"""Packed matrices, inputs of very different sizes, and the bound that a product must keep."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from tolerances import sum_error
from trilens.ternary.packed.linear import Packed
from trilens.ternary.quantize import PerLayerQuant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = ["absmean", "asymmetric", "planes"]


def made(rows: int, cols: int, seed: int = 0, **options: object) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, cols, generator=generator)
    return Packed.of(PerLayerQuant.quantize(weights, "w", **options))


@st.composite
def packed_matrices(
    draw: st.DrawFn, rows: tuple[int, int], cols: tuple[int, int], groups: list[int]
) -> Packed:
    """Any rule and grouping, rows and columns within bounds."""
    per = draw(st.sampled_from(["tensor", "row", "group"]))
    size = draw(st.sampled_from(groups)) if per == "group" else None
    options = {"rule": draw(st.sampled_from(RULES)), "per": per, "group_size": size}
    return made(
        draw(st.integers(*rows)), draw(st.integers(*cols)), draw(st.integers(0, 99)), **options
    )


@st.composite
def biases(draw: st.DrawFn, packed: Packed, x: torch.Tensor) -> torch.Tensor | None:
    return torch.linspace(-1, 1, len(packed.codes)).to(x.dtype) if draw(st.booleans()) else None


def inputs(n: int, cols: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Columns of very different sizes: sums in half precision would lose the small ones.
    sizes = torch.logspace(-2, 2, cols)
    return (torch.randn(n, cols, generator=generator) * sizes).to(dtype)


def check(y: torch.Tensor, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> None:
    """One rounding to the dtype, and those of a float32 sum.

    With two planes or an offset, weights may be used before they are rounded: half a unit of the
    dtype for each. An offset may be added up apart from the rest, which it can cancel.
    """
    weights = packed.dense(x.dtype).double()
    expected = x.double() @ weights.T
    trits = weights if packed.offset is None else replace(packed, offset=None).dense(x.dtype)
    terms = trits.double().abs() + (weights - trits.double()).abs()
    size = x.double().abs() @ terms.T
    if bias is not None:
        expected = expected + bias.double()
        size = size + bias.double().abs()
    # one more rounding for the scale, one for the bias
    bound = torch.from_numpy(sum_error(packed.cols + 2, size, torch.float32))
    bound += expected.abs() * torch.finfo(x.dtype).eps / 2 + torch.finfo(x.dtype).tiny
    if packed.offset is not None or packed.second_codes is not None:
        bound += size * torch.finfo(x.dtype).eps
    assert y.dtype == x.dtype
    worst = ((y.double() - expected).abs() / bound).max()
    assert float(worst) <= 1
