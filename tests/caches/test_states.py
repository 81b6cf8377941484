"""StateCache: what is stored, what is asked, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from recurrent_cases import normal
from tolerances import sum_error
from trilens.caches.states import StateCache, StatePart, StateSpec
from trilens.errors import DtypeError, NotStoredError, OutOfRangeError, ShapeError, UsageError

MATRIX = StateSpec(
    kind="gated delta net",
    formula="S_t = …",
    read="y_t = S_tᵀ q_t",
    parts=(StatePart("S", ("heads", "k", "v"), (2, 3, 4)),),
    where="kernel",
)
SOFTMAX = StateSpec(
    kind="RWKV-4",
    formula="…",
    read="…",
    parts=(StatePart("numerator", ("hidden",), (5,)), StatePart("maximum", ("hidden",), (5,))),
    where="kernel",
)


def tensors() -> dict[int, dict[str, torch.Tensor]]:
    return {
        4: {"maximum": normal(2, 5, seed=1), "numerator": normal(2, 5, seed=2)},
        1: {"S": normal(2, 2, 3, 4)},
    }


def cache() -> StateCache:
    return StateCache.from_layers(
        tensors(),
        {1: MATRIX, 4: SOFTMAX},
        positions=(3, 8),
        seq=9,
        reasons={0: "the layer is not recurrent"},
    )


def test_what_is_stored() -> None:
    states, given = cache(), tensors()
    assert states.layers == (1, 4)
    assert states.n_layers == 2
    assert states.positions == (3, 8)
    assert states.seq == 9
    assert not states.is_empty
    assert StateCache().is_empty
    assert states.nbytes == 4 * (2 * 24 + 2 * 5 + 2 * 5)
    assert torch.equal(states.get(1), given[1]["S"][1])
    assert torch.equal(states.get(1, 3), states.get(1, -6))
    assert torch.equal(states.get(1, np.int64(3)), given[1]["S"][0])
    # The spec's first part, in whatever order they were given.
    assert torch.equal(states.get(4, 8), given[4]["numerator"][1])
    assert torch.equal(states.get(4, 8, "maximum"), given[4]["maximum"][1])
    assert states.spec(1).axes == ("heads", "k", "v")
    assert states.spec(1).shape == tuple(states.get(1).shape)
    assert repr(states) == "StateCache(layers 1, 4; after tokens 3, 8 of 9)"


def test_norms() -> None:
    states, given = cache(), tensors()
    expected = [float(given[1]["S"][1].norm()), float(given[4]["numerator"][1].norm())]
    assert states.norms().dtype == np.float32
    close = float(sum_error(12, 1, torch.float32))  # of squares
    np.testing.assert_allclose(states.norms(), expected, rtol=close)
    heads = given[1]["S"][0].reshape(2, -1).norm(dim=1)
    np.testing.assert_allclose(states.unit_norms(1, 3), heads.numpy(), rtol=close)
    maximum = given[4]["maximum"][1].abs()
    np.testing.assert_allclose(states.unit_norms(4, -1, "maximum"), maximum.numpy(), rtol=close)


def test_refused_with_what_is_there() -> None:
    states = cache()
    with pytest.raises(
        NotStoredError, match=r"layer 0 is not stored \(the layer is not recurrent\): .*1, 4"
    ):
        states.get(0)
    with pytest.raises(
        NotStoredError, match=r"layer 2 is not stored: this StateCache holds layers 1, 4"
    ):
        states.spec(2)
    with pytest.raises(NotStoredError, match=r"position 5 is not stored: .*positions 3, 8"):
        states.get(1, 5)
    with pytest.raises(NotStoredError, match="part 'S' of the state of layer 4 is not there"):
        states.get(4, part="S")
    with pytest.raises(OutOfRangeError, match="position 9 is out of range"):
        states.norms(9)
    with pytest.raises(OutOfRangeError, match="position True is not an integer"):
        states.get(1, True)
    with pytest.raises(UsageError, match="layer 'a' is not a whole number"):
        states.get("a")


def test_params_go_through_json() -> None:
    states = cache()
    params = json.loads(json.dumps(states.params()))
    again = StateCache.rebuild(tensors(), params)
    assert again.params() == states.params()
    assert again.spec(4) == SOFTMAX
    assert again.reasons == {0: "the layer is not recurrent"}
    assert torch.equal(again.get(4), states.get(4))


def test_moved() -> None:
    states = cache()
    other = states.to("meta")
    assert other.get(1).device.type == "meta"
    assert other.params() == states.params()
    assert states.to("cpu").get(1).data_ptr() == states.get(1).data_ptr()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"specs": {1: MATRIX}}, UsageError, r"layers \[4\] have states or a spec but not both"),
        ({"positions": (8, 3)}, UsageError, "not ascending"),
        ({"positions": ()}, UsageError, "not ascending"),
        ({"positions": (3, 9)}, OutOfRangeError, "position 9 is out of range"),
        ({"specs": {1: SOFTMAX, 4: SOFTMAX}}, UsageError, "has parts"),
        ({"positions": (3,)}, ShapeError, r"has shape \[2, 2, 3, 4\]"),
    ],
)
def test_what_does_not_belong_together(change, error, message) -> None:
    given = {"specs": {1: MATRIX, 4: SOFTMAX}, "positions": (3, 8), "seq": 9, **change}
    with pytest.raises(error, match=message):
        StateCache.from_layers(tensors(), given.pop("specs"), **given)


def test_integers_are_no_states() -> None:
    layers = {1: {"S": torch.zeros(2, 2, 3, 4, dtype=torch.int64)}}
    with pytest.raises(DtypeError, match=r"'S' of layer 1 is torch\.int64"):
        StateCache.from_layers(layers, {1: MATRIX}, positions=(3, 8), seq=9)
