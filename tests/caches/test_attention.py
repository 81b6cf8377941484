"""AttentionCache: its questions, its layers and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tolerances import sum_error
from trilens.caches import attention
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.patterns.protocol import DensePattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.errors import (
    NonFiniteError,
    NotStoredError,
    OutOfRangeError,
    ShapeError,
    TooLargeError,
    UsageError,
    ValueRangeError,
)

# Two float32 ways to the same number: weights below 1, of sums over 20 keys and scores that are
# sums of 8 products with Σ|terms| below 8.
TOLERANCE = float(sum_error(20, 1, torch.float32) + sum_error(8, 8, torch.float32) / 4)


def _pattern(seed: int = 0, batch: int = 2, seq: int = 20, **options: Any) -> SoftmaxPattern:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, seq, 8, generator=generator)
    k = torch.randn(batch, 2, seq, 8, generator=generator)
    return SoftmaxPattern(q, k, scaling=0.35, causal=True, **options)


def _sealed() -> AttentionCache:
    return AttentionCache.from_layers(
        {5: _pattern(5), 1: _pattern(1), 2: _pattern(2)},
        n_model_layers=7,
        reasons={0: "its mixer is Mamba2Mixer"},
    )


def _pushed(*patterns: Tensor) -> AttentionCache:
    cache = AttentionCache()
    for pattern in patterns:
        cache.push(pattern)
    return cache


def _close(got: np.ndarray, want: Tensor) -> None:
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=TOLERANCE)


# --- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lazy", "pushed"])
def test_rows_and_columns_are_those_of_the_matrix(kind: str) -> None:
    lazy = _sealed()
    dense = lazy.get_layer(1)
    assert dense is not None
    cache, layer = (lazy, 1) if kind == "lazy" else (_pushed(dense, dense), 1)
    for batch in range(2):
        for at in (0, 7, -1, -20):
            row = cache.attention_from_position(layer, at, batch=batch)
            _close(row, dense[batch, :, at].mean(0))
            column = cache.attention_to_position(layer, at, batch=batch)
            _close(column, dense[batch, :, :, at].mean(0))
            for head in range(4):
                _close(
                    cache.attention_from_position(layer, at, head=head, batch=batch),
                    dense[batch, head, at],
                )
                _close(
                    cache.attention_to_position(layer, at, head, batch), dense[batch, head, :, at]
                )


@pytest.mark.parametrize("batch", [0, 1])
def test_lazy_and_pushed_give_the_same_statistics(batch: int) -> None:
    sealed = AttentionCache.from_layers(
        {0: _pattern(3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))}, n_model_layers=1
    )
    dense = sealed.get_layer(0)
    assert dense is not None
    pushed = _pushed(dense)
    shapes = {"entropy": (4, 20), "mean_distance": (4, 20), "received": (4, 20)}
    for question in (*shapes, "sink_mass"):
        ours = getattr(sealed, question)(0, batch=batch)
        assert ours.dtype == np.float32 and ours.shape == (4, 20)
        theirs = getattr(pushed, question)(0, batch=batch)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * TOLERANCE)
    assert (sealed.sink_mass(0) > 0).all()


def test_batch_0_is_asked_by_default() -> None:
    cache = _sealed()
    assert np.array_equal(cache.entropy(2), cache.entropy(2, batch=0))
    assert not np.array_equal(cache.entropy(2), cache.entropy(2, batch=1))


def test_top_attended_positions_come_in_descending_order() -> None:
    cache = _sealed()
    row = cache.attention_from_position(5, -1, head=3, batch=1)
    top = cache.top_attended_positions(5, -1, 6, head=3, batch=1)
    assert len(top) == 6
    assert [weight for _, weight in top] == sorted(row.tolist(), reverse=True)[:6]
    assert all(row[position] == np.float32(weight) for position, weight in top)
    assert all(type(position) is int and type(weight) is float for position, weight in top)


def test_equal_weights_come_in_order_of_position() -> None:
    row = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2])
    cache = _pushed(row.expand(1, 2, 5, 5))
    top = cache.top_attended_positions(0, 2, 5)
    assert [position for position, _ in top] == [1, 3, 4, 0, 2]
    assert [position for position, _ in cache.top_attended_positions(0, 2, 2)] == [1, 3]


def test_many_equal_weights_come_in_order_of_position() -> None:
    row = (torch.arange(300) % 3).float()
    top = _pushed(row.expand(1, 1, 1, 300)).top_attended_positions(0, 0, 150)
    assert [position for position, _ in top] == [*range(2, 300, 3), *range(1, 150, 3)]


def test_more_than_all_keys_are_all_keys() -> None:
    top = _sealed().top_attended_positions(1, 3, 500)
    assert sorted(position for position, _ in top) == list(range(20))
    assert [position for position, weight in top if weight == 0] == list(range(4, 20))


@pytest.mark.parametrize("k", [0, -1, True, 2.0, None])
def test_a_k_that_is_no_count_is_refused(k: Any) -> None:
    with pytest.raises(ValueRangeError, match=r"k .* is out of range: .* 1 or more"):
        _sealed().top_attended_positions(1, 3, k)


def test_half_precision_patterns_are_averaged_in_float32() -> None:
    weights = torch.rand(1, 64, 3, 3).softmax(-1).bfloat16()
    got = _pushed(weights).attention_from_position(0, 1)
    mean = weights[0, :, 1].double().mean(0)
    np.testing.assert_allclose(got, mean, rtol=float(sum_error(64, 1, torch.float32)))


def test_no_matrix_is_built_for_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: object) -> Tensor:
        raise AssertionError("dense() was called")

    monkeypatch.setattr(SoftmaxPattern, "dense", refuse)
    cache = _sealed()
    cache.attention_from_position(1, 0)
    cache.attention_to_position(1, 0)
    cache.top_attended_positions(1, -1, 3)
    for question in (cache.entropy, cache.mean_distance, cache.received, cache.sink_mass):
        question(1)
    with pytest.raises(AssertionError, match="dense"):
        cache.get_layer(1)


# --- what is not there ---------------------------------------------------------------------------

QUESTIONS = {
    "attention_from_position": (0,),
    "attention_to_position": (0,),
    "top_attended_positions": (0, 1),
    "entropy": (),
    "mean_distance": (),
    "received": (),
    "sink_mass": (),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_refuses_a_layer_or_batch_that_is_not_there(question: str) -> None:
    ask, more = getattr(_sealed(), question), QUESTIONS[question]
    for layer in (7, -1):
        with pytest.raises(OutOfRangeError, match="this model has layers 0–6"):
            ask(layer, *more)
    for layer in (True, 1.0, None):
        with pytest.raises(OutOfRangeError, match=f"layer {layer} is not a whole number"):
            ask(layer, *more)
    with pytest.raises(NotStoredError) as caught:
        ask(0, *more)
    assert str(caught.value) == (
        "layer 0 is not stored (its mixer is Mamba2Mixer): this AttentionCache holds layers 1, 2, 5"
    )
    with pytest.raises(NotStoredError, match="layer 6 is not stored: this"):
        ask(6, *more)
    with pytest.raises(OutOfRangeError, match="batch row 2 is out of range: layer 1 has"):
        ask(1, *more, batch=2)
    with pytest.raises(OutOfRangeError, match=r"layer 0 is not stored: .* holds no layers"):
        getattr(AttentionCache(), question)(0, *more)
    with pytest.raises(OutOfRangeError, match=r"layer 1 is not stored: .* holds layer 0"):
        getattr(_pushed(torch.eye(3)[None, None]), question)(1, *more)


@pytest.mark.parametrize(
    "question", ["attention_from_position", "attention_to_position", "top_attended_positions"]
)
@pytest.mark.parametrize("position", [20, -21, 1.5, True, None])
def test_a_position_that_is_not_there_is_named(question: str, position: Any) -> None:
    more = QUESTIONS[question][1:]
    with pytest.raises(OutOfRangeError, match=r"layer 2 has (query|key) positions −20–19"):
        getattr(_sealed(), question)(2, position, *more)
    with pytest.raises(OutOfRangeError, match="head 4 is out of range: layer 2 has heads 0–3"):
        getattr(_sealed(), question)(2, 0, *more, head=4)


def test_signed_patterns_have_rows_but_no_entropy() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [-0.5, 1.0]]]])
    cache = _pushed(weights)
    assert cache.attention_from_position(0, 1).tolist() == [-0.5, 1.0]
    assert cache.top_attended_positions(0, 1, 1) == [(1, 1.0)]
    for question in ("entropy", "mean_distance", "received", "sink_mass"):
        with pytest.raises(UsageError, match="relu_l1"):
            getattr(cache, question)(0)


# --- layers --------------------------------------------------------------------------------------


def test_a_cache_built_by_hand() -> None:
    cache = AttentionCache.with_capacity(2)
    assert cache.is_empty and cache.n_layers == 0 and cache.layers == ()
    first, second = torch.rand(1, 2, 3, 3), torch.rand(1, 2, 4, 4)
    cache.push(first)
    cache.push(second)
    assert (cache.n_layers, cache.layers, cache.is_empty) == (2, (0, 1), False)
    got = cache.get_layer(1)
    assert got is not None and got.data_ptr() == second.data_ptr()
    assert cache.get_layer(2) is None and cache.get_layer(-1) is None
    patterns = cache.patterns
    assert isinstance(patterns, tuple) and all(isinstance(each, Tensor) for each in patterns)
    assert torch.equal(patterns[0], first)  # type: ignore[arg-type]
    assert isinstance(cache.pattern(0), DensePattern)
    assert cache.n_model_layers is None and cache.reasons == {}


def test_push_keeps_no_graph() -> None:
    cache = _pushed(torch.rand(1, 1, 2, 2, requires_grad=True))
    got = cache.get_layer(0)
    assert got is not None and not got.requires_grad


@pytest.mark.parametrize("capacity", [-1, True, 2.5, None])
def test_a_capacity_is_a_count(capacity: Any) -> None:
    with pytest.raises(ValueRangeError, match="capacity"):
        AttentionCache.with_capacity(capacity)


def test_push_refuses_what_is_no_pattern() -> None:
    with pytest.raises(ShapeError, match=r"\[batch, heads, seq_q, seq_k\]"):
        AttentionCache().push(torch.rand(2, 3, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_push_refuses_weights_that_are_no_numbers(bad: float) -> None:
    cache = _pushed(torch.eye(40)[None, None])
    pattern = torch.zeros(1, 2, 40, 40)
    pattern[0, 1, 3:33] = bad
    with pytest.raises(NonFiniteError, match=r"layer 1 has 1,200 of 3,200 weights"):
        cache.push(pattern)
    assert cache.n_layers == 1


def test_a_sealed_cache_is_keyed_by_the_models_layers() -> None:
    cache = _sealed()
    assert (cache.layers, cache.n_layers, cache.n_model_layers) == ((1, 2, 5), 3, 7)
    assert cache.get_layer(0) is None and cache.get_layer(99) is None
    assert cache.get_layer(5) is not None
    assert all(isinstance(each, SoftmaxPattern) for each in cache.patterns)
    assert cache.pattern(5) is cache.patterns[2]
    assert cache.reasons == {0: "its mixer is Mamba2Mixer"}
    with pytest.raises(UsageError, match="sealed"):
        cache.push(torch.rand(1, 2, 3, 3))
    with pytest.raises(OutOfRangeError, match="layer 7 is out of range: this model has layers 0–6"):
        AttentionCache.from_layers({7: _pattern()}, n_model_layers=7)


def test_get_layer_refuses_a_layer_that_is_no_integer() -> None:
    for layer in (True, 1.0, "1"):
        with pytest.raises(OutOfRangeError, match=r"layer .* is not a whole number"):
            _sealed().get_layer(layer)  # type: ignore[arg-type]


def test_a_large_pattern_is_built_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _sealed()
    assert cache.pattern(1).dense_bytes == 2 * 4 * 20 * 20 * 4
    monkeypatch.setattr(attention, "DENSE_LIMIT_BYTES", 2 * 4 * 20 * 20 * 4 - 1)
    with pytest.raises(TooLargeError, match=r"layer 1 \[2, 4, 20, 20\] would take .* MiB: .*rows"):
        cache.get_layer(1)
    large = cache.get_layer(1, allow_large=True)
    assert large is not None and large.shape == (2, 4, 20, 20)
    huge = torch.zeros(1, 1, 1, 8).expand(1, 16, 50_000, 8)
    sealed = AttentionCache.from_layers(
        {0: SoftmaxPattern(huge, huge, scaling=1.0)}, n_model_layers=1
    )
    monkeypatch.undo()
    with pytest.raises(TooLargeError, match="152,588 MiB: up to 256 MiB"):
        sealed.get_layer(0)


def test_shared_memory_counts_once() -> None:
    mask = torch.ones(1, 1, 20, 20).tril().bool()
    patterns = {i: SoftmaxPattern(*_q_k(i), scaling=1.0, mask=mask) for i in range(3)}
    cache = AttentionCache.from_layers(patterns, n_model_layers=3)
    assert cache.nbytes == 3 * 2 * (4 * 20 * 8 * 4) + 20 * 20
    moved = cache.to("cpu")
    assert moved.nbytes == cache.nbytes and moved.layers == cache.layers
    assert np.array_equal(moved.entropy(1), cache.entropy(1))
    on_meta = cache.to("meta")
    masks = [on_meta.pattern(i).tensors()["mask"] for i in range(3)]
    assert all(each.device.type == "meta" for each in masks)


def _q_k(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, 4, 20, 8, generator=generator),
        torch.randn(1, 4, 20, 8, generator=generator),
    )


def test_to_keeps_a_pushed_cache_open() -> None:
    cache = _pushed(torch.eye(3)[None, None]).to("cpu")
    cache.push(torch.eye(3)[None, None])
    assert cache.layers == (0, 1)
    with pytest.raises(UsageError, match="sealed"):
        _sealed().to("cpu").push(torch.eye(3)[None, None])


def test_patterns_are_rebuilt_by_their_kind() -> None:
    for pattern in (_pattern(), DensePattern(torch.rand(1, 2, 3, 3))):
        rebuilt = rebuild_pattern(pattern.tensors(), pattern.params())
        assert type(rebuilt) is type(pattern)
        assert torch.equal(rebuilt.dense(), pattern.dense())
    with pytest.raises(UsageError, match="kind 'hyper' is unknown: the kinds are dense, softmax"):
        rebuild_pattern({}, {"kind": "hyper"})


def test_repr_says_what_is_inside() -> None:
    assert repr(AttentionCache()) == "AttentionCache(empty)"
    assert repr(_sealed()) == "AttentionCache(layers 1, 2, 5, 0.0 MiB)"
