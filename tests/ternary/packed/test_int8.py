"""Products of rounded inputs against whole numbers, with the library and without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_cases import RULES, inputs, made
from tolerances import assert_close_sums
from trilens import quantize_activations
from trilens.errors import UsageError, ValueRangeError
from trilens.ternary.packed import int8 as subject
from trilens.ternary.packed.cpu import native
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.int8 import multiply_int8, round_inputs
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.packed.multiply import multiply_back
from trilens.ternary.quantize import PerLayerQuant

LEVEL = native._level()
WAYS = ["native", "without"] if LEVEL else ["without"]
OPTIONS = [{}, {"per": "row"}, {"group_size": 16}, {"group_size": 48}, {"group_size": 128}]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without":
        monkeypatch.setattr(native, "_level", lambda: 0)
    return request.param


def test_the_library_is_used_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    ask = native._function
    monkeypatch.setattr(native, "_function", lambda name: used.append(name) or ask(name))
    multiply_int8(inputs(3, 96, torch.bfloat16), made(20, 96, group_size=32))
    assert used == (["prepare_int8", "multiply_int8"] if LEVEL else [])
    used.clear()
    multiply_int8(inputs(3, 96, torch.bfloat16), made(20, 96, group_size=20))
    assert used == []


def test_rounding_is_to_the_nearest_step_of_each_token() -> None:
    x = inputs(5, 77, torch.bfloat16)
    x[3] = 0
    rounded, factors, powers = round_inputs(x)
    assert rounded.dtype == torch.int8
    assert rounded.abs().amax(-1).tolist() == [127, 127, 127, 0, 127]
    back = rounded.double() * (factors.double() * powers)[:, None]
    allowed = x.double().abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)
    assert ((back - x.double()).abs() <= allowed).all()


# The largest input: a tiny one, some around the one whose reciprocal overflows, denormal ones.
@pytest.mark.parametrize("power", [-63, -64, -65, -118, -120, -121, -122, -126, -127, -137, -142])
def test_tiny_inputs_are_those_of_ordinary_size(way: str, power: int) -> None:
    """Whole numbers up to 127 times a power of two, that are exact in float32 at any size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 300), generator=generator).float()
    x[:, 3] = 127
    packed = made(70, 300, group_size=32)
    tiny = x.clone()
    tiny[1] = (x[1].double() * 2.0 ** (power - 6)).float()
    assert torch.equal(tiny[1].double() * 2.0 ** (6 - power), x[1].double())
    rounded, factors, powers = round_inputs(tiny)
    assert torch.equal(rounded, x.to(torch.int8))
    assert (factors.double() * powers).tolist() == [1, 2.0 ** (power - 6), 1]
    wanted, found = multiply_int8(x, packed), multiply_int8(tiny, packed)
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    assert torch.equal(found[1], (wanted[1].double() * 2.0 ** (power - 6)).float())


def test_the_smallest_number_there_is(way: str) -> None:
    x = torch.zeros(2, 64)
    x[0, 5] = -(2.0**-149)
    packed = made(70, 64, per="row")
    ones = {name: torch.ones_like(part) for name, part in packed.parts.items() if name == "scale"}
    packed = replace(packed, **ones)
    assert torch.equal(multiply_int8(x, packed), x @ packed.dense().T)


@pytest.mark.parametrize("n_inputs", [1, 2, 3, 9])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rule", [*RULES, "quad"])
def test_whole_numbers_are_exact(way: str, rule: str, options: dict, n_inputs: int) -> None:
    packed = made(69, 531, rule=rule, **options)
    ones = {
        name: torch.ones_like(part) for name, part in packed.parts.items() if "codes" not in name
    }
    ones |= {name: 2 * part for name, part in ones.items() if name == "second_scale"}
    whole = replace(packed, **ones)
    generator = torch.Generator().manual_seed(n_inputs)
    x = torch.randint(-127, 128, (n_inputs, 531), generator=generator)
    x[:, 3] = 127  # the factor is 1
    expected = x.numpy() @ whole.dense().numpy().astype(np.int64).T
    assert multiply_int8(x.float(), whole).numpy().astype(np.int64).tolist() == expected.tolist()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"group_size": 20}, {"group_size": 128}], ids=str)
def test_autocast_rounds_no_whole_number(way: str, options: dict, cast: torch.dtype) -> None:
    packed = made(70, 4096, **options)
    x, bias = inputs(3, 4096, torch.float32), torch.linspace(-1, 1, 70)
    x[1] = x[1].abs() + 1  # sums beyond the largest float16 number
    wanted = multiply_int8(x.to(cast), packed, bias.to(cast))
    with torch.autocast("cpu", dtype=cast):
        found = multiply_int8(x, packed, bias)
    assert found.dtype == cast
    assert torch.equal(found, wanted)
    assert torch.isfinite(found).all()


def test_codes_that_are_not_in_memory_are_not_read() -> None:
    packed = made(20, 96, group_size=32)
    absent = replace(packed, codes=packed.codes.to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        multiply_int8(inputs(3, 96, torch.bfloat16), absent).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rule", [*RULES, "quad"])
def test_scales_come_last(way: str, rule: str, options: dict, dtype: torch.dtype) -> None:
    packed = made(70, 301, rule=rule, **options)
    x = inputs(3, 301, dtype)
    bias = torch.linspace(-1, 1, 70).to(dtype)
    rounded, factors, _ = round_inputs(x)
    exact = rounded.double() * factors.double()[:, None]
    parts = [replace(packed, offset=None, second_codes=None, second_scale=None).dense()]
    parts.append(packed.dense() - parts[0])
    terms = sum(exact.abs() @ part.double().abs().T for part in parts) + bias.double().abs()
    expected = exact @ packed.dense().double().T + bias.double()
    found = multiply_int8(x, packed, bias)
    assert found.dtype == dtype
    # several roundings of each term, and one to the dtype
    terms = terms + expected.abs() * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_close_sums(found, expected, terms, 310, torch.float32)


def test_what_is_not_finite_shows(way: str) -> None:
    packed = made(70, 64, group_size=32)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = inputs(2, 64, torch.bfloat16)
        x[1, 5] = bad
        found = multiply_int8(x, packed)
        assert found[0].isfinite().all()
        assert not found[1].isfinite().any()


def test_inputs_of_any_shape_and_none(way: str) -> None:
    packed = made(70, 64, per="row")
    wide = inputs(8, 100, torch.bfloat16)
    flat = multiply_int8(wide[:, 3:67], packed)
    assert torch.equal(multiply_int8(wide[:, 3:67].reshape(2, 4, 64), packed).reshape(8, 70), flat)
    assert multiply_int8(wide[:0, :64], packed).shape == (0, 70)


def test_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = made(500, 300, group_size=32), inputs(20, 300, torch.bfloat16)
    alone = multiply_int8(x, packed)
    monkeypatch.setattr(subject, "_WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(multiply_int8(x, packed), alone) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_a_model_rounds_and_stops_rounding() -> None:
    quant = PerLayerQuant.quantize(torch.randn(70, 64), "w", group_size=32)
    layer = TernaryLinear.from_quant(quant, torch.ones(70))
    experts = TernaryExperts(3, 64, 70, group_size=32)
    for name, part in layer.packed.parts.items():
        getattr(experts, name).data.copy_(part.expand(3, *part.shape))
    model = torch.nn.ModuleList([layer, experts, torch.nn.Linear(3, 3)])
    x = inputs(4, 64, torch.float32)
    with torch.no_grad():
        plain = layer(x)
    assert quantize_activations(model) == 2
    rounded = layer(x)
    assert torch.equal(rounded, multiply_int8(x, layer.packed, layer.bias))
    assert not torch.equal(rounded, plain)
    by_experts = experts(x, torch.tensor([1, 1, 4]))
    assert torch.equal(by_experts, multiply_int8(x, layer.packed))
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    assert torch.equal(wanted.grad, multiply_back(torch.ones_like(plain), layer.packed))
    assert quantize_activations(model, bits=None) == 2
    assert torch.equal(layer(x), plain)


def test_what_cannot_be_is_refused() -> None:
    for bits in (4, 8.0, True):
        with pytest.raises(ValueRangeError, match=f"bits is {bits}: pass 8"):
            quantize_activations(torch.nn.Linear(3, 3), bits=bits)
    with pytest.raises(UsageError, match="Linear has no packed ternary layer"):
        quantize_activations(torch.nn.Linear(3, 3))


def test_compiled_and_traced_graphs_hold_the_same() -> None:
    layer = TernaryLinear.from_quant(PerLayerQuant.quantize(torch.randn(70, 64), "w", per="row"))
    layer.requires_grad_(False)
    quantize_activations(layer)
    x = inputs(4, 64, torch.float32)
    program = torch.export.export(layer, (x,)).module()
    terms = x.abs().amax(-1, keepdim=True) * layer.reconstruct().abs().sum(-1)
    assert_close_sums(program(x), layer(x), terms, 64, torch.float32)
