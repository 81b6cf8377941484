"""Gates of recurrences and routers in a `GateCache`, against plain float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import assert_close_sums
from trilens.caches.gates import GateCache, GateSpec
from trilens.errors import UsageError, ValueRangeError

RATE = "mixer.rate"


def spec(name: str, kind: str, function: str, shape: tuple[int, ...], **changes) -> GateSpec:
    entries = {"formula": function, "range": (0.0, 1.0), "where": "mixer", "static": False}
    return GateSpec(name=name, kind=kind, function=function, shape=shape, **{**entries, **changes})


def ssm(dt: torch.Tensor, rate: torch.Tensor) -> GateCache:
    """dt [seq, channels] and A [channels, states]."""
    channels, states = rate.shape
    records = {("mixer.dt", 3): dt, ("mixer.decay", 3): dt, (RATE, 3): rate.reshape(1, -1)}
    specs = {
        ("mixer.dt", 3): spec(
            "mixer.dt", "step", "step", (channels,), rate=RATE, range=(0.0, math.inf)
        ),
        ("mixer.decay", 3): spec(
            "mixer.decay", "decay", "step_decay", (channels, states), rate=RATE
        ),
        (RATE, 3): spec(
            RATE, "linear", "identity", (channels, states), static=True, range=(-math.inf, 0.0)
        ),
    }
    return GateCache.from_records(records, specs)


@pytest.mark.parametrize("states", [1, 4])
def test_state_space_gates(states: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dt = torch.rand(7, 5, generator=generator) * 0.1
    rate = -torch.rand(5, states, generator=generator) * 16
    cache = ssm(dt, rate)
    decay = torch.exp(dt.double()[:, :, None] * rate.double())
    flat = decay.reshape(7, 5 * states)
    # float32: one rounding of the exponent (below 2) and one of the exponential
    assert torch.allclose(cache.get("mixer.decay", 3).double(), flat, rtol=5e-7, atol=0)
    assert torch.allclose(cache.openness("mixer.decay", 3).double(), flat, rtol=5e-7, atol=0)
    assert torch.equal(cache.get("mixer.dt", 3), dt)
    taken = 1 - decay.mean(-1)
    # 1 less a mean of numbers up to 1
    assert_close_sums(cache.openness("mixer.dt", 3), taken, 1.0, states + 2, torch.float32)
    assert cache.analyse("mixer.decay", 3).n_units == 5 * states
    assert cache.to("cpu").openness("mixer.dt", 3).shape == (7, 5)


@settings(deadline=None)
@given(st.floats(-30.0, -1e-12))
def test_horizon_and_half_life(log: float) -> None:
    x = torch.tensor([[log]], dtype=torch.float64)
    key = ("mixer.decay", 0)
    cache = GateCache.from_records({key: x}, {key: spec("mixer.decay", "decay", "log_decay", (1,))})
    # The reference keeps its digits near 1 through expm1 as well, in plain Python.
    np.testing.assert_allclose(cache.horizon_tokens(*key), [[-1 / math.expm1(log)]], rtol=1e-12)
    np.testing.assert_allclose(cache.half_life_tokens(*key), [[math.log(2) / -log]], rtol=1e-12)
    assert float(cache.horizon_tokens(*key)) >= 1.0


def test_horizon_is_the_sum_of_the_weights() -> None:
    key = ("mixer.decay", 0)
    cache = GateCache.from_records(
        {key: torch.tensor([[math.log(0.9)]])}, {key: spec(key[0], "decay", "log_decay", (1,))}
    )
    total = sum(0.9**k for k in range(2000))
    assert float(cache.horizon_tokens(*key)) == pytest.approx(total, rel=1e-6)
    assert 0.9 ** float(cache.half_life_tokens(*key)) == pytest.approx(0.5, rel=1e-6)


def test_a_decay_with_an_attainable_range() -> None:
    low = math.exp(-math.exp(-0.5))
    key = ("mixer.decay", 0)
    x = torch.log(torch.tensor([[low, (low + 1) / 2, 1.0]]))
    cache = GateCache.from_records(
        {key: x}, {key: spec(key[0], "decay", "log_decay", (3,), range=(low, 1.0))}
    )
    np.testing.assert_allclose(cache.openness(*key), [[0.0, 0.5, 1.0]], atol=1e-6)
    assert float(cache.openness(*key).min()) >= 0.0


def test_values_that_are_kept_as_they_are() -> None:
    x = torch.tensor([[0.0, 0.25, 1.0]])
    for function, factor, top in (("unit", 1.0, 1.0), ("doubled", 2.0, 2.0)):
        key = ("mixer.beta", 1)
        cache = GateCache.from_records(
            {key: x * factor}, {key: spec(key[0], "sigmoid", function, (3,), range=(0.0, top))}
        )
        assert torch.equal(cache.get(*key), x * factor)
        assert torch.equal(cache.openness(*key), x)


def test_a_router_sums_to_one_over_all_experts() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) * 4
    key = ("router", 0)
    cache = GateCache.from_records({key: logits}, {key: spec("router", "router", "softmax", (8,))})
    reference = torch.softmax(logits.double(), -1)
    assert torch.allclose(cache.get(*key).double(), reference, atol=1e-7)
    assert torch.allclose(cache.openness(*key).sum(-1), torch.ones(6), atol=1e-6)
    half = GateCache.from_records(
        {key: logits.bfloat16()}, {key: spec("router", "router", "softmax", (8,))}
    )
    assert half.get(*key).dtype == torch.float32


@pytest.mark.parametrize("function", ["exp", "softplus"])
def test_unbounded_gates_have_no_openness(function: str) -> None:
    key = ("attn.out_gate", 0)
    cache = GateCache.from_records(
        {key: torch.zeros(2, 3)}, {key: spec(key[0], "linear", function, (3,))}
    )
    with pytest.raises(UsageError, match="has no openness"):
        cache.openness(*key)
    with pytest.raises(UsageError, match="only a decay has a memory horizon"):
        cache.horizon_tokens(*key)


def test_a_rate_has_to_be_there() -> None:
    dt = torch.ones(2, 3)
    key = ("mixer.dt", 0)
    step = spec("mixer.dt", "step", "step", (3,), rate=RATE)
    with pytest.raises(UsageError, match="needs the static gate"):
        GateCache.from_records({key: dt}, {key: step})
    rate = spec(RATE, "linear", "identity", (4,), static=True)
    with pytest.raises(UsageError, match="a multiple of 3 units"):
        GateCache.from_records(
            {key: dt, (RATE, 0): torch.zeros(1, 4)}, {key: step, (RATE, 0): rate}
        )
    with pytest.raises(ValueRangeError, match="functions of dt and A"):
        spec("mixer.dt", "step", "step", (3,))
    with pytest.raises(ValueRangeError, match="no other does"):
        spec("mixer.beta", "sigmoid", "unit", (3,), rate=RATE)


def test_specs_survive_json() -> None:
    for original in (
        spec("mixer.decay", "decay", "step_decay", (3, 2), rate=RATE),
        spec("router", "router", "softmax", (8,)),
    ):
        assert GateSpec.from_dict(original.to_dict()) == original
    assert spec("mixer.decay", "decay", "step_decay", (3, 2), rate=RATE).stored_units == 3
