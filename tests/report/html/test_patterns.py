"""Patterns as bytes: what the page shows is what the model did, to a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from page_cases import attention
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import DensePattern
from trilens.errors import NonFiniteError
from trilens.report.patterns import head_patterns


@pytest.mark.parametrize("signed", [False, True])
def test_weights_come_back_to_a_step(signed: bool) -> None:
    cache = attention(24, layers=2, heads=3, signed=signed)
    found = head_patterns(cache, "effective" if signed else "softmax", (0, 1))
    assert (found.side, found.pool, found.causal, found.signed) == (24, 1, True, signed)
    for layer in (0, 1):
        for head in range(3):
            true = cache.get_layer(layer)[0, head].numpy()
            scale = np.abs(true).max()
            # Half a step of the square root.
            error = np.abs(
                np.sqrt(np.abs(found.weights(layer, head)) / scale) - np.sqrt(np.abs(true) / scale)
            )
            assert error.max() <= 0.5 / found.steps + 1e-6
            large = np.abs(true) > scale / found.steps
            assert (np.sign(found.weights(layer, head)) == np.sign(true))[large].all()


def test_long_prompts_show_the_largest_weight_of_a_cell() -> None:
    n = 1100
    weights = torch.zeros(1, 1, n, n)
    weights[0, 0, 1000, 501] = -0.75
    weights[0, 0, 1000, 502] = 0.5
    weights[0, 0, 7, 3] = 0.25
    cache = AttentionCache.from_layers({4: DensePattern(weights)}, n_model_layers=5)
    found = head_patterns(cache, "effective", (4,))
    assert found.side <= 512 and found.pool == 3
    assert "3 × 3 tokens" in found.note
    shown = found.weights(4, 0)
    assert shown[1000 // 3, 501 // 3] == pytest.approx(-0.75, rel=1e-6)
    assert shown[7 // 3, 3 // 3] == pytest.approx(0.25, rel=0.02)
    assert np.count_nonzero(shown) == 2


def test_both_triangles_are_kept_where_a_model_looks_ahead() -> None:
    weights = torch.rand(1, 2, 5, 5).softmax(-1)
    cache = AttentionCache.from_layers({0: DensePattern(weights)}, n_model_layers=1)
    found = head_patterns(cache, "softmax", (0,))
    assert not found.causal
    np.testing.assert_allclose(found.weights(0, 1), weights[0, 1].numpy(), rtol=0.02)


def test_layers_may_have_different_heads() -> None:
    few, many = attention(6, layers=1, heads=2), attention(6, layers=1, heads=5, seed=1)
    both = {0: few.pattern(0), 2: many.pattern(0)}
    cache = AttentionCache.from_layers(both, n_model_layers=3)
    found = head_patterns(cache, "softmax", (0, 2))
    assert found.heads == (2, 5)
    true = many.get_layer(0)[0, 4].numpy()
    np.testing.assert_allclose(found.weights(2, 4), true, atol=0.01)


def test_a_head_without_weights_divides_by_nothing() -> None:
    cache = AttentionCache.from_layers({0: DensePattern(torch.zeros(1, 1, 4, 4))}, n_model_layers=1)
    assert not head_patterns(cache, "softmax", (0,)).weights(0, 0).any()


def test_nan_is_no_weight() -> None:
    weights = torch.full((1, 1, 4, 4), torch.nan)
    cache = AttentionCache.from_layers({3: DensePattern(weights)}, n_model_layers=4)
    with pytest.raises(NonFiniteError, match="layer 3 holds NaN"):
        head_patterns(cache, "softmax", (3,))
