"""DensePattern: the same answers from a stored tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pattern_cases import (
    WEIGHT,
    assert_matches,
    build,
)
from trilens.caches.patterns.protocol import DensePattern
from trilens.errors import (
    DtypeError,
    ShapeError,
    UsageError,
)


@pytest.mark.parametrize(
    "name", ["causal", "full", "sliding window", "sinks", "cached keys", "rows that see nothing"]
)
def test_a_stored_pattern_gives_the_same_answers(name: str) -> None:
    _, want = build(name)
    # The sink's share is what a row lacks to 1, good to a few roundings of 1 in float32.
    assert_matches(DensePattern(want.weights.float()), want)
    assert_matches(DensePattern(want.weights), want, weight=WEIGHT * 1e-7)


def test_a_stored_pattern_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, want = build("sliding window")
    monkeypatch.setattr("trilens.caches.patterns.protocol.BLOCK_BYTES", 32 * 6 * 70 * 9)
    assert_matches(DensePattern(want.weights.float()), want)


def test_a_stored_half_precision_pattern_has_no_sink_of_rounding() -> None:
    _, want = build("causal")
    assert (DensePattern(want.weights.bfloat16()).sink_mass() == 0).all()
    sinks = build("sinks")[1]
    # Weights in bfloat16 are off by 2⁻⁹ of themselves, sums of them too; less than that is noise.
    got = DensePattern(sinks.weights.bfloat16()).sink_mass().double()
    torch.testing.assert_close(got, sinks.sink_mass[0], rtol=0, atol=2**-6 + 2**-9)


def test_visible_in_a_stored_pattern_is_what_has_weight() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])[None, None]
    got = DensePattern(weights).received()[0]
    torch.testing.assert_close(got, torch.tensor([1.7 / 3, 0.8 / 2, 0.5]))


def test_a_stored_pattern_knows_whether_it_is_signed() -> None:
    assert not DensePattern(torch.tensor([[[[0.0, 1.0]]]])).signed
    assert DensePattern(torch.tensor([[[[-0.1, 1.0]]]])).signed


def test_a_stored_pattern_is_unpadded_and_rebuilt() -> None:
    pattern = DensePattern(torch.rand(2, 3, 6, 6))
    one = pattern.unpad(1, 4)
    assert torch.equal(one.tensor, pattern.tensor[1:, :, :4, :4])
    assert one.nbytes == 3 * 4 * 4 * 4
    rebuilt = DensePattern.rebuild(pattern.tensors(), pattern.params())
    assert torch.equal(rebuilt.dense(), pattern.tensor)
    assert rebuilt.dense_bytes == pattern.nbytes
    assert torch.equal(pattern.to("cpu").tensor, pattern.tensor)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.zeros(2, 3, 3), ShapeError),
        (torch.zeros(1, 0, 3, 3), ShapeError),
        (torch.zeros(1, 1, 3, 3).long(), DtypeError),
        ([[1.0]], UsageError),
    ],
)
def test_a_pattern_has_four_axes_of_floats(tensor: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="it has to be"):
        DensePattern(tensor)
