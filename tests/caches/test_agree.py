"""What holds for every cache: mapping from layers, one error for an absent layer, any integer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trilens.caches import (
    ActivationCache,
    AttentionCache,
    FullActivationCache,
    GateCache,
    GateSpec,
    StateCache,
    StatePart,
    StateSpec,
)
from trilens.caches.patterns.protocol import DensePattern
from trilens.errors import AbsentLayerError, NotStoredError, OutOfRangeError

LAYERS = (1, 4)
GATE = GateSpec("mlp.gate", "activation", "silu(x)", "silu", (-0.28, float("inf")), (3,), "mlp")
STATE = StateSpec("scalar", "h", "h", (StatePart("h", ("units",), (3,)),), "kernel")


KEYS = [("mlp.gate", layer) for layer in LAYERS]
GATES = GateCache.from_records({key: torch.randn(5, 3) for key in KEYS}, dict.fromkeys(KEYS, GATE))
CACHES = {
    "last": ActivationCache.from_layers({i: torch.randn(3) for i in LAYERS}),
    "all": FullActivationCache.from_layers({i: torch.randn(5, 3) for i in LAYERS}),
    "attention": AttentionCache.from_layers(
        {i: DensePattern(torch.rand(1, 2, 5, 5)) for i in LAYERS}, n_model_layers=6
    ),
    "states": StateCache.from_layers(
        {i: {"h": torch.randn(2, 3)} for i in LAYERS},
        dict.fromkeys(LAYERS, STATE),
        positions=(1, 4),
        seq=5,
    ),
}
ASKED = {
    "last": lambda layer: CACHES["last"][layer],
    "all": lambda layer: CACHES["all"][layer],
    "position": lambda layer: CACHES["all"].get_position(layer, -1),
    "attention": lambda layer: CACHES["attention"][layer],
    "rows": lambda layer: CACHES["attention"].attention_from_position(layer, -1),
    "top": lambda layer: CACHES["attention"].top_attended_positions(layer, -1, 2),
    "entropy": CACHES["attention"].entropy,
    "gate": lambda layer: GATES["mlp.gate", layer],
    "openness": lambda layer: GATES.openness("mlp.gate", layer),
    "states": lambda layer: CACHES["states"][layer],
    "state": CACHES["states"].get,
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_a_cache_is_a_mapping_from_layers(cache) -> None:
    assert list(cache) == list(cache.layers) == list(LAYERS) and len(cache) == 2
    assert 4 in cache and np.int64(1) in cache and 2 not in cache and -1 not in cache
    assert not cache.is_empty and cache.n_layers == 2


def test_gates_are_a_mapping_from_names_and_layers() -> None:
    cache = GATES
    assert list(cache) == [("mlp.gate", 1), ("mlp.gate", 4)] and len(cache) == 2
    assert ("mlp.gate", 4) in cache and ("mlp.gate", 2) not in cache
    assert torch.equal(cache["mlp.gate", 1], cache.get("mlp.gate", 1))


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("layer", [0, 2, 5, 40, -1])
def test_an_absent_layer_is_one_error(ask, layer: int) -> None:
    with pytest.raises(AbsentLayerError, match=f"layer {layer} is not stored.*layers 1, 4") as one:
        ask(layer)
    assert isinstance(one.value, NotStoredError) and isinstance(one.value, OutOfRangeError)


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_any_integer_is_a_layer_and_no_bool_is(ask) -> None:
    plain = ask(4)
    for layer in (np.int64(4), np.uint8(4), torch.tensor(4)):
        same = ask(layer)
        assert torch.equal(same, plain) if isinstance(plain, torch.Tensor) else True
    for layer in (True, np.True_, torch.tensor(True), 4.0, "4", None):
        with pytest.raises(OutOfRangeError, match="is not a whole number"):
            ask(layer)


@pytest.mark.parametrize("cache", [c for c in CACHES.values() if hasattr(c, "get_layer")])
def test_get_layer_of_an_absent_layer_is_none(cache) -> None:
    assert all(cache.get_layer(layer) is None for layer in (-1, 0, 2, 99, np.int32(2)))
    assert cache.get_layer(np.int32(4)) is not None


def test_residuals_are_arrays() -> None:
    last, full = CACHES["last"], CACHES["all"]
    assert np.asarray(last).shape == (2, 3) and np.asarray(full).shape == (2, 5, 3)
    assert np.array_equal(np.asarray(full)[1], full[4].numpy())
    assert np.asarray(full, dtype=np.float64).dtype == np.float64
    half = ActivationCache([torch.ones(3, dtype=torch.bfloat16)])
    assert np.asarray(half).dtype == np.float32
    with pytest.raises(ValueError, match="copy=False"):
        np.array(last, copy=False)
    with pytest.raises(NotStoredError):
        np.asarray(ActivationCache())
