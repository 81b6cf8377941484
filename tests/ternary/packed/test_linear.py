"""`TernaryLinear` against the dense layer that it stands in for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from tolerances import assert_close_sums, largest
from trilens.errors import CorruptFileError, DtypeError, ShapeError
from trilens.ternary.codecs.packing import TwoBit
from trilens.ternary.codecs.rows import holds_code_3, pack_rows, unpack_rows
from trilens.ternary.packed.linear import Packed, TernaryLinear
from trilens.ternary.quantize import PerLayerQuant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "tensor": {},
    "row": {"per": "row", "rule": "exact"},
    "group": {"group_size": 8},
    "odd group": {"group_size": 5, "rule": "twn"},
    "asymmetric": {"group_size": 8, "rule": "asymmetric"},
    "planes": {"per": "row", "rule": "planes"},
    "planes of odd groups": {"group_size": 7, "rule": "planes"},
    "float16 scales": {"per": "row", "scale_dtype": "float16"},
}


def weights(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def unpack_slowly(codes: np.ndarray, cols: int) -> np.ndarray:
    """The layout, written out number by number."""
    out = np.empty((codes.shape[0], cols), dtype=np.int8)
    for row in range(codes.shape[0]):
        for col in range(cols):
            out[row, col] = (int(codes[row, col // 4]) >> (2 * (col % 4)) & 3) - 1
    return out


def dense_of(quant: PerLayerQuant) -> np.ndarray:
    """Ŵ in float64 from trits and scales alone, weight by weight."""
    rows, cols = quant.shape
    size = quant.group_size or cols
    n_groups = -(-cols // size)

    def value(values, row, col):
        flat = np.asarray(values, dtype=np.float32).reshape(-1)
        if quant.per == "tensor":
            return float(flat[0])
        return float(flat[row if quant.per == "row" else row * n_groups + col // size])

    out = np.zeros(quant.shape)
    for row in range(rows):
        for col in range(cols):
            out[row, col] = value(quant.scale, row, col) * int(quant.trits[row, col])
            if quant.second_trits is not None:
                out[row, col] += value(quant.second_scale, row, col) * int(
                    quant.second_trits[row, col]
                )
            if quant.offset is not None:
                out[row, col] += value(quant.offset, row, col)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 19), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_exact(rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, cols), generator=generator).to(torch.int8)
    codes = pack_rows(trits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (rows, -(-cols // 4))
    assert np.array_equal(unpack_slowly(codes.numpy(), cols), trits.numpy())
    assert torch.equal(unpack_rows(codes, cols), trits)
    assert not holds_code_3(codes)
    if cols % 4 == 0:  # then rows end on bytes, and the layout is the codec's
        assert np.array_equal(codes.numpy().reshape(-1), TwoBit().encode(trits).reshape(-1))


@pytest.mark.parametrize("place", range(4))
def test_code_3_is_seen_in_every_place(place: int) -> None:
    codes = torch.full((2, 3), 0b01100100, dtype=torch.uint8)
    assert not holds_code_3(codes)
    codes[1, 2] |= 3 << (2 * place)
    assert holds_code_3(codes)


def test_only_trits_are_packed() -> None:
    with pytest.raises(DtypeError, match="int8"):
        pack_rows(torch.zeros(2, 4))
    quant = PerLayerQuant.quantize(torch.randn(2, 3, 4), "w")
    with pytest.raises(ShapeError, match="matrix"):
        Packed.of(quant)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cols", [24, 23])
def test_the_weight_is_the_quantizers(name: str, cols: int) -> None:
    quant = PerLayerQuant.quantize(weights(6, cols), "w", **OPTIONS[name])
    layer = TernaryLinear.from_quant(quant)
    assert torch.equal(layer.reconstruct(), quant.reconstruct())
    # Two products and two sums in float32.
    parts = (quant.scale, quant.second_scale, quant.offset)
    terms = sum(largest(part) for part in parts if part is not None)
    assert_close_sums(layer.reconstruct(), dense_of(quant), terms, 3, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_the_dense_layers(name: str, dtype: torch.dtype) -> None:
    quant = PerLayerQuant.quantize(weights(6, 23), "w", **OPTIONS[name])
    bias = torch.linspace(-1, 1, 6)
    layer = TernaryLinear.from_quant(quant, bias, dtype=dtype)
    dense = nn.Linear(23, 6, dtype=dtype)
    dense.weight.data.copy_(quant.reconstruct())  # rounded once
    dense.bias.data.copy_(bias)
    x = torch.randn(2, 3, 23, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), dense(x))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, leaf in ((layer, ours), (dense, theirs)):
        module(leaf).float().square().sum().backward()
    assert ours.grad.dtype == dtype
    # Sums of 6 (bias: over inputs, input: over rows) terms in another order.
    upstream = 2 * dense(x).detach().double().abs().reshape(6, 6)
    terms = (upstream @ dense.weight.detach().double().abs()).reshape(2, 3, 23)
    assert_close_sums(ours.grad, theirs.grad, terms, 6, dtype)
    assert_close_sums(layer.bias.grad, dense.bias.grad, upstream.sum(0), 6, dtype)


def test_gradient_is_right_by_finite_differences() -> None:
    quant = PerLayerQuant.quantize(weights(4, 9).double(), "w", group_size=4)
    layer = TernaryLinear.from_quant(quant, torch.ones(4), dtype=torch.float64)
    x = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))


def test_backward_keeps_no_dense_weight() -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(weights(64, 64), "w"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(1, 64, requires_grad=True))
    assert not any(tensor.numel() >= 64 * 64 for tensor in saved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv1d_orientation(dtype: torch.dtype) -> None:
    old = Conv1D(6, 10)  # holds [in, out]
    quant = PerLayerQuant.quantize(old.weight.T, "w", per="row")
    layer = TernaryLinear.from_quant(quant, old.bias, transposed=True, dtype=dtype)
    assert layer.weight.shape == old.weight.shape
    assert layer.weight.dtype == dtype
    old.weight.data.copy_(quant.reconstruct().T)
    old.to(dtype)
    x = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        ours, theirs = layer(x), old(x)
    assert torch.equal(layer.weight, old.weight)
    # addmm and linear may sum 10 products and a bias in another order.
    terms = x.double().abs() @ old.weight.detach().double().abs() + old.bias.detach().abs()
    assert_close_sums(ours, theirs, terms, 11, dtype)


def test_dtype_moves_never_touch_codes_and_scales() -> None:
    quant = PerLayerQuant.quantize(weights(6, 23), "w", per="row")
    layer = TernaryLinear.from_quant(quant, torch.zeros(6))
    before = {name: tensor.clone() for name, tensor in layer.packed.parts.items()}
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        move(layer)
        for name, tensor in layer.packed.parts.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
            assert not tensor.requires_grad
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    again = copy.deepcopy(layer)
    assert torch.equal(
        again(torch.ones(23, dtype=torch.bfloat16)), layer(torch.ones(23).bfloat16())
    )


def test_state_is_small_and_loads_back() -> None:
    quant = PerLayerQuant.quantize(weights(64, 128), "w", group_size=64)
    layer = TernaryLinear.from_quant(quant)
    state = layer.state_dict()
    assert set(state) == {"codes", "scale"}
    assert layer.bits_per_weight == 2 + 32 / 64
    empty = TernaryLinear(128, 64, bias=False, group_size=64)
    assert not empty.reconstruct().any()
    empty.load_state_dict(state)
    assert torch.equal(empty.reconstruct(), quant.reconstruct())
    assert "group of 64" in repr(empty)


def test_autocast_computes_and_goes_back() -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(weights(4, 8), "w"), torch.ones(4))
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    dense = layer.reconstruct()
    terms = dense.abs().sum(0).expand(3, 8)
    assert_close_sums(x.grad, dense.sum(0).expand(3, 8), terms, 4, torch.bfloat16)


def test_damage_is_named() -> None:
    quant = PerLayerQuant.quantize(weights(4, 8), "w")
    layer = TernaryLinear.from_quant(quant)
    layer.check("a.b")
    layer.codes.data[1, 1] = 0xFF
    with pytest.raises(CorruptFileError, match=r"codes of a\.b hold the code 3"):
        layer.check("a.b")
    layer = TernaryLinear.from_quant(quant)
    layer.scale.data.fill_(float("nan"))
    with pytest.raises(CorruptFileError, match=r"scale of a\.b"):
        layer.check("a.b")
    with pytest.raises(ShapeError, match="bias"):
        TernaryLinear.from_quant(quant, torch.zeros(5))


def test_no_input_rows() -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(weights(4, 8), "w"))
    assert layer(torch.zeros(0, 8)).shape == (0, 4)
