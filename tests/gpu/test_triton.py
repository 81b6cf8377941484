"""Triton's kernels against float64: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from packed_cases import DTYPES, biases, check, inputs, made, packed_matrices
from tolerances import assert_close_sums
from trilens.ternary.packed import multiply
from trilens.ternary.packed.gpu import dispatch as gpu
from trilens.ternary.packed.linear import Packed, TernaryLinear
from trilens.ternary.quantize import PerLayerQuant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on(packed: Packed, device: str) -> Packed:
    parts = {name: part.to(device) for name, part in packed.parts.items()}
    return Packed(cols=packed.cols, group_size=packed.group_size, **parts)


def product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    there = None if bias is None else bias.to(DEVICE)
    return gpu.multiply_on_gpu(x.to(DEVICE), on(packed, DEVICE), there).cpu()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Packed, torch.Tensor, torch.Tensor | None]:
    packed = draw(packed_matrices((1, 100), (1, 500), [5, 48, 128, 1024]))
    n = draw(st.sampled_from([1, 2, 4, 5, 16, 17, 70]))
    # The interpreter's matrix product multiplies the bits of bfloat16 as whole numbers.
    can = [t for t in DTYPES if DEVICE == "cuda" or n <= 4 or t != torch.bfloat16]
    x = inputs(n, packed.cols, draw(st.sampled_from(can)))
    return packed, x, draw(biases(packed, x))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_kernels_are_the_dense_layer(case) -> None:
    packed, x, bias = case
    check(product(x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("n_inputs", [1, 8])
def test_infinite_inputs_are_not_hidden(n_inputs: int) -> None:
    packed = made(40, 64, per="row")
    x = inputs(n_inputs, 64, torch.float32)
    x[0, 5] = float("inf")
    expected = x @ packed.dense().T
    with np.errstate(invalid="ignore"):  # the interpreter computes with NumPy
        found = product(x, packed, None)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_inputs_of_any_shape_and_order() -> None:
    packed = made(20, 36)
    x = inputs(6, 36, torch.float32)
    flat = product(x, packed, None)
    assert torch.equal(product(x.reshape(2, 3, 36), packed, None), flat.reshape(2, 3, 20))
    turned = x.T.contiguous().T
    assert torch.equal(product(turned, packed, None), flat)


def test_the_layer_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(64, 64), "w", per="row"))
    layer.to(DEVICE)
    called = []
    monkeypatch.setattr(
        multiply, "multiply_on_gpu", lambda *a: called.append(1) or gpu.multiply_on_gpu(*a)
    )
    if DEVICE == "cpu":  # the interpreter stands in for the GPU
        monkeypatch.setattr(multiply, "triton_computes", lambda *_: True)
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert called
    weights, given = layer.reconstruct().double().cpu(), x.detach().double().cpu()
    terms = given.abs() @ weights.abs().T
    assert_close_sums(y, given @ weights.T, terms, 64, torch.float32)
    terms = weights.abs().sum(0).expand(3, -1)
    assert_close_sums(x.grad, weights.sum(0).expand(3, -1), terms, 64, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert layer(x.detach()).dtype == torch.bfloat16


def test_what_they_are_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = made(40, 64)
    assert not gpu.triton_computes(inputs(1, 64, torch.float32), packed)
    if DEVICE == "cuda":
        there = on(packed, DEVICE)
        x = inputs(1, 64, torch.float32).to(DEVICE)
        assert gpu.triton_computes(x, there)
        assert not gpu.triton_computes(x, packed)
        assert not gpu.triton_computes(x.double(), there)
        assert not gpu.triton_computes(x[:0], there)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert not gpu.triton_computes(x, there)
