from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from tolerances import assert_close_sums
from trilens.caches.gate_functions import GATE_FUNCTIONS
from trilens.caches.gates import GateCache, GateSpec
from trilens.errors import (
    DtypeError,
    NonFiniteError,
    NotStoredError,
    ShapeError,
    UsageError,
    ValueRangeError,
)
from trilens.statistics.gating import GatingAnalysis

NAME = "mlp.gate"


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def inner(x: float) -> float:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


# Each function and its openness once more, in plain Python.
REFERENCE = {
    "silu": (lambda x: x / (1 + math.exp(-x)), lambda x: 1 / (1 + math.exp(-x))),
    "gelu": (lambda x: x * phi(x), phi),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + math.tanh(inner(x))), phi),
    "gelu_new": (lambda x: 0.5 * x * (1 + math.tanh(inner(x))), phi),
    "gelu_fast": (lambda x: 0.5 * x * (1 + math.tanh(inner(x))), phi),
    "quick_gelu": (
        lambda x: x / (1 + math.exp(-1.702 * x)),
        lambda x: 1 / (1 + math.exp(-1.702 * x)),
    ),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "relu2": (lambda x: max(x, 0.0) ** 2, lambda x: float(x > 0)),
    "sigmoid": (lambda x: 1 / (1 + math.exp(-x)), lambda x: 1 / (1 + math.exp(-x))),
    "tanh": (math.tanh, None),
    "identity": (lambda x: x, None),
}

# Our name → the name in transformers' table.
THEIRS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_fast",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "identity": "linear",
}


def spec(function: str = "silu", shape: tuple[int, ...] = (4,), **changes) -> GateSpec:
    entries = {
        "name": NAME,
        "kind": "activation",
        "formula": f"{function}(x)",
        "function": function,
        "range": GATE_FUNCTIONS[function].range,
        "shape": shape,
        "where": "model.layers.0.mlp.act_fn",
        "static": False,
    }
    return GateSpec(**{**entries, **changes})


def cache_of(x: torch.Tensor, function: str = "silu", layer: int = 0) -> GateCache:
    key = (NAME, layer)
    return GateCache.from_records({key: x}, {key: spec(function, (x.shape[1],))})


def inputs() -> torch.Tensor:
    return torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-4])])


@pytest.mark.parametrize("function", GATE_FUNCTIONS)
def test_values_and_openness_are_the_formulas(function: str) -> None:
    value, openness = REFERENCE[function]
    x = inputs()
    cache = cache_of(x[None], function)
    # float32: two roundings of values up to 12, squared up to 144, so 4e-6 relative
    np.testing.assert_allclose(
        cache.get(NAME, 0)[0], [value(v) for v in x.double().tolist()], rtol=4e-6, atol=2e-6
    )
    wide = cache_of(x.double()[None], function)
    # gelu_fast writes √(2/π) with ten digits, which moves values by up to 3e-11
    np.testing.assert_allclose(
        wide.get(NAME, 0)[0], [value(v) for v in x.double().tolist()], rtol=1e-9, atol=1e-10
    )
    if openness is None:
        with pytest.raises(UsageError, match=r"has no openness.*silu.*sigmoid have one"):
            cache.openness(NAME, 0)
        with pytest.raises(UsageError, match="has no openness"):
            cache.analyse(NAME, 0)
        return
    opened = cache.openness(NAME, 0)
    assert opened.dtype == torch.float32
    assert opened.shape == cache.pre(NAME, 0).shape
    np.testing.assert_allclose(
        opened[0], [openness(v) for v in x.double().tolist()], rtol=2e-6, atol=1e-7
    )
    # one rounding to float32, nothing before it
    np.testing.assert_allclose(
        wide.openness(NAME, 0)[0], [openness(v) for v in x.double().tolist()], rtol=6.1e-8, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("function", GATE_FUNCTIONS)
def test_values_are_bit_for_bit_those_of_transformers(function: str, dtype: torch.dtype) -> None:
    x = (torch.randn(16, 33, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    got = cache_of(x, function).get(NAME, 0)
    wanted = ACT2FN[THEIRS[function]](x)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("function", GATE_FUNCTIONS)
def test_ranges_are_attained_and_not_left(function: str) -> None:
    low, high = GATE_FUNCTIONS[function].range
    y = GATE_FUNCTIONS[function].value(torch.linspace(-40, 40, 400_001, dtype=torch.float64))
    assert float(y.min()) >= low - 1e-15
    assert float(y.max()) <= high + 1e-15
    if math.isfinite(low):
        assert float(y.min()) == pytest.approx(low, abs=1e-8)  # the grid's step is 2e-4
    if math.isfinite(high):
        assert float(y.max()) == pytest.approx(high, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None)
@given(xs=st.tuples(*[st.floats(allow_nan=False, allow_infinity=True, width=16)] * 2))
def test_openness_is_in_the_unit_interval_and_rises(dtype: torch.dtype, xs) -> None:
    pair = torch.tensor([sorted(xs)]).to(dtype)
    for name, entry in GATE_FUNCTIONS.items():
        if entry.openness:
            low, high = entry.openness(pair)[0].tolist()
            assert 0.0 <= low <= high <= 1.0, name


@pytest.mark.parametrize("function", [name for name, e in GATE_FUNCTIONS.items() if e.openness])
def test_nan_is_not_hidden_by_openness(function: str) -> None:
    x = torch.zeros(3, 4)
    x[2, 1] = math.nan
    cache = cache_of(x, function)
    assert cache.openness(NAME, 0)[2, 1].isnan()
    assert int(cache.openness(NAME, 0).isnan().sum()) == 1
    with pytest.raises(NonFiniteError, match="step 2, unit 1"):
        cache.analyse(NAME, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_openness_of_a_narrow_dtype_is_computed_in_float32(function: str, dtype) -> None:
    x = torch.tensor([[-7.5, -3.25, 0.125, 2.5, 4.5]]).to(dtype)  # exact in both dtypes
    _, openness = REFERENCE[function]
    got = cache_of(x, function).openness(NAME, 0)
    # float32 in the tail: 2·z²·2⁻²⁴ relative at z = 7.5/√2; bfloat16 would be off by 4e-3
    np.testing.assert_allclose(got[0], [openness(v) for v in x[0].tolist()], rtol=1e-5)
    assert float(got.max()) < 1.0  # nearly open is not open


def test_openness_of_a_sigmoid_is_the_value_the_model_used() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    cache = cache_of(x, "sigmoid")
    assert torch.equal(cache.openness(NAME, 0), cache.get(NAME, 0).float())


def test_analyse_is_the_analysis_of_the_openness() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3)) + torch.linspace(-5, 5, 6)
    cache = cache_of(x)
    got = cache.analyse(NAME, 0, threshold=0.2)
    sigma = [[1 / (1 + math.exp(-v)) for v in row] for row in x.double().tolist()]
    wanted = GatingAnalysis.from_activations(sigma, 0.2)
    # float32 openness: an exponential and a quotient, averaged in float64
    assert_close_sums(got.avg_gate, wanted.avg_gate, 1.0, 4, torch.float32)
    assert got.dead_gates.tolist() == wanted.dead_gates.tolist() == [0, 1]
    assert got.saturated_gates.tolist() == wanted.saturated_gates.tolist() == [4, 5]
    assert cache.analyse(NAME, 0).threshold == 0.1


def test_a_cache_says_what_it_holds() -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    keys = [(NAME, layer) for layer in (7, 0, 2)]
    cache = GateCache.from_records(
        {key: x * key[1] for key in keys}, {key: spec(where=f"layers.{key[1]}") for key in keys}
    )
    assert cache.names == (NAME,)
    assert cache.layers(NAME) == (0, 2, 7)
    assert not cache.is_empty
    assert cache.nbytes == 3 * 3 * 4 * 4
    assert not cache.pre(NAME, 7).requires_grad
    assert not cache.get(NAME, 7).requires_grad
    assert cache.spec(NAME).where == "layers.0"
    assert cache.spec(NAME, 7).where == "layers.7"
    assert repr(cache) == "GateCache(mlp.gate: layers 0, 2, 7)"
    assert repr(GateCache()) == "GateCache(empty)"
    with pytest.raises(NotStoredError, match=r"'mixer\.z' is not stored.*'mlp\.gate'"):
        cache.layers("mixer.z")
    for ask in (cache.get, cache.pre, cache.openness, cache.analyse, cache.spec):
        with pytest.raises(NotStoredError, match=r"layer 1.*layers 0, 2, 7"):
            ask(NAME, 1)
        with pytest.raises(NotStoredError, match="'router' is not stored"):
            ask("router", 0)
        with pytest.raises(UsageError, match="not a whole number"):
            ask(NAME, 1.5)
    with pytest.raises(NotStoredError, match="holds no gates"):
        GateCache().layers(NAME)


def test_pre_is_kept_by_reference() -> None:
    x = torch.zeros(3, 4)
    assert cache_of(x).pre(NAME, 0).data_ptr() == x.data_ptr()


def test_spec_without_a_layer_wants_layers_that_agree() -> None:
    x = torch.zeros(3, 4)
    cache = GateCache.from_records(
        {(NAME, 0): x, (NAME, 5): x}, {(NAME, 0): spec(), (NAME, 5): spec("gelu")}
    )
    with pytest.raises(UsageError, match=r"differs between layers.*silu\(x\).*layer 5 gelu\(x\)"):
        cache.spec(NAME)
    assert cache.spec(NAME, 5).function == "gelu"


def test_to_moves_everything() -> None:
    cache = cache_of(torch.zeros(3, 4))
    moved = cache.to("meta")
    assert moved.pre(NAME, 0).device.type == "meta"
    assert moved.spec(NAME) == cache.spec(NAME)
    assert cache.pre(NAME, 0).device.type == "cpu"
    with pytest.raises(UsageError, match="cannot be used"):
        cache.to("nowhere")


def test_records_that_do_not_fit_their_spec_are_refused() -> None:
    key, x = (NAME, 0), torch.zeros(3, 4)
    with pytest.raises(UsageError, match="not both"):
        GateCache.from_records({key: x}, {})
    with pytest.raises(UsageError, match="not both"):
        GateCache.from_records({}, {key: spec()})
    with pytest.raises(ShapeError, match=r"has shape \[3, 5\].*\[seq, 4\]"):
        GateCache.from_records({key: torch.zeros(3, 5)}, {key: spec()})
    with pytest.raises(ShapeError, match=r"has shape \[1, 3, 4\]"):
        GateCache.from_records({key: x[None]}, {key: spec()})
    with pytest.raises(ShapeError, match="static gate has seq = 1"):
        GateCache.from_records({key: x}, {key: spec(static=True)})
    with pytest.raises(ShapeError, match="one prompt"):
        GateCache.from_records({key: x, (NAME, 1): x[:2]}, {key: spec(), (NAME, 1): spec()})
    with pytest.raises(DtypeError, match=r"torch\.int64"):
        GateCache.from_records({key: x.long()}, {key: spec()})
    with pytest.raises(DtypeError, match="is list"):
        GateCache.from_records({key: [[0.0]]}, {key: spec()})
    with pytest.raises(ValueRangeError, match="layer -1"):
        GateCache.from_records({(NAME, -1): x}, {(NAME, -1): spec()})
    with pytest.raises(UsageError, match="name and spec belong together"):
        GateCache.from_records({("mixer.z", 0): x}, {("mixer.z", 0): spec()})


def test_static_gates_and_shaped_gates_are_stored() -> None:
    still, heads = spec(static=True), spec(shape=(2, 3))
    cache = GateCache.from_records(
        {(NAME, 0): torch.zeros(1, 4), (NAME, 1): torch.zeros(5, 6)},
        {(NAME, 0): still, (NAME, 1): heads},
    )
    assert cache.spec(NAME, 1).shape == (2, 3)
    assert heads.units == 6
    assert cache.get(NAME, 0).shape == (1, 4)


@pytest.mark.parametrize("function", GATE_FUNCTIONS)
def test_a_spec_survives_json(function: str) -> None:
    original = spec(function, (2, 3), static=True)
    text = json.dumps(original.to_dict(), allow_nan=False)
    assert GateSpec.from_dict(json.loads(text)) == original


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "no.such.gate"}, ValueRangeError),
        ({"kind": "door"}, ValueRangeError),
        ({"function": "softsign"}, ValueRangeError),
        ({"range": [1.0, 0.0]}, ValueRangeError),
        ({"range": [0.0]}, UsageError),
        ({"range": None}, UsageError),
        ({"range": ["a", 1]}, UsageError),
        ({"shape": []}, ValueRangeError),
        ({"shape": [4, 0]}, ValueRangeError),
        ({"shape": [4.5]}, UsageError),
        ({"shape": 4}, UsageError),
        ({"static": "no"}, UsageError),
        ({"name": ["mlp.gate"]}, UsageError),
        ({"extra": 1}, UsageError),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(change, error) -> None:
    with pytest.raises(error):
        GateSpec.from_dict({**spec().to_dict(), **change})


def test_a_spec_with_a_hole_is_refused() -> None:
    plain = spec().to_dict()
    del plain["where"]
    with pytest.raises(UsageError, match="needs exactly"):
        GateSpec.from_dict(plain)
