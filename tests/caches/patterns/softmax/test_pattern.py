"""SoftmaxPattern against a float64 reference: answers, engines, memory, what it keeps."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pattern_cases import (
    CASES,
    NATS,
    WEIGHT,
    additive,
    assert_matches,
    build,
    normal,
    padding,
    reference,
    window,
    zeros,
)
from trilens.caches.patterns.protocol import BLOCK_BYTES, DensePattern, Pattern
from trilens.caches.patterns.softmax import blocks as softmax_blocks
from trilens.caches.patterns.softmax import fused as softmax_fused
from trilens.caches.patterns.softmax import pattern as softmax_pattern
from trilens.caches.patterns.softmax.fused import fits_fused, summarise_blocks, summarise_fused
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern


@pytest.mark.parametrize("name", CASES)
def test_everything_matches_the_float64_reference(name: str) -> None:
    pattern, want = build(name)
    assert_matches(pattern, want)
    for batch in range(2):
        torch.testing.assert_close(pattern.lse(batch).double(), want.lse[batch], rtol=0, atol=NATS)


@pytest.mark.parametrize("name", CASES)
def test_float64_stays_float64(name: str) -> None:
    pattern, want = build(name, torch.float64)
    assert pattern.entropy().dtype == torch.float64
    assert_matches(pattern, want, weight=WEIGHT * 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "grouped query", "sliding window", "softcap", "sinks"])
def test_half_precision_is_promoted_before_anything_is_computed(
    name: str, dtype: torch.dtype
) -> None:
    # The reference reads the same rounded q and k: no tolerance for half precision is needed.
    pattern, want = build(name, dtype)
    assert pattern.rows([0]).dtype == torch.float32
    assert_matches(pattern, want)


@pytest.mark.parametrize("name", CASES)
def test_one_head_is_a_slice_of_all(name: str) -> None:
    pattern, _ = build(name)
    rows, columns = pattern.rows([0, -1], batch=1), pattern.columns([0, -1], batch=1)
    for head in range(6):
        one = pattern.rows([0, -1], head=head, batch=1)
        # Products of other sizes add up in another order.
        torch.testing.assert_close(one, rows[head : head + 1], rtol=0, atol=WEIGHT)
        one = pattern.columns([0, -1], head, 1)
        torch.testing.assert_close(one, columns[head : head + 1], rtol=0, atol=WEIGHT)


@pytest.mark.parametrize("name", ["causal", "full", "grouped query", "one key head", "sinks"])
def test_the_fused_pass_and_the_blocks_agree(name: str) -> None:
    pattern, want = build(name)
    inputs = pattern._inputs(1)
    assert fits_fused(inputs)
    for summary in (summarise_fused(inputs), summarise_blocks(inputs)):
        torch.testing.assert_close(
            summary.entropy.double(), want.entropy[1], rtol=0, atol=NATS, check_stride=False
        )
        lse = summary.lse + softmax_blocks.shift(inputs)
        torch.testing.assert_close(lse.double(), want.lse[1], rtol=0, atol=NATS)


@pytest.mark.parametrize(
    "name", ["sliding window", "softcap", "bias", "cached keys", "padding", "additive mask"]
)
def test_the_fused_pass_refuses_what_it_cannot_do(name: str) -> None:
    assert not fits_fused(build(name)[0]._inputs(0))


def test_without_the_fused_operator_the_blocks_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_fused, "_FLASH", None)
    pattern, want = build("causal")
    assert not fits_fused(pattern._inputs(0))
    assert_matches(pattern, want)


@pytest.mark.parametrize("common", [0.0, 30.0])
@pytest.mark.parametrize("size", [20.0, 300.0])
def test_large_scores_keep_their_digits(size: float, common: float) -> None:
    # Scores up to `size` · 5, on top of a mean key that adds up to 10 times that.
    q = normal(1, 2, 256, 64, seed=1, scale=size**0.5)
    k = normal(1, 2, 256, 64, seed=2, scale=size**0.5)
    q[..., :4] += 3 * size**0.5 * (common > 0)
    k[..., :4] += common * size**0.5
    pattern = SoftmaxPattern(q, k, scaling=0.125, causal=True)
    inputs = pattern._inputs(0)
    truth = torch.einsum("hqd,hkd->hqk", q[0].double(), k[0].double()) * 0.125
    truth = truth.masked_fill(torch.ones(256, 256).triu(1).bool(), -torch.inf).log_softmax(-1)
    entropy = -(truth.exp() * truth.clamp(min=-1e6)).sum(-1)

    def error(got: Tensor) -> float:
        return float((got.double() - entropy).abs().max())

    # Scores of 1,500 are themselves off by 1e-4 in float32; without the common part taken off,
    # or by the difference of lse and mean score alone, the error is ten times larger.
    assert error(pattern.entropy()) < {20.0: 5e-5, 300.0: 2e-4}[size]
    assert error(summarise_blocks(inputs).entropy) < {20.0: 5e-5, 300.0: 2e-4}[size]


def test_rows_whose_entropy_is_a_difference_of_large_numbers_are_computed_from_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k = normal(1, 3, 400, 32, seed=1, scale=20), normal(1, 3, 400, 32, seed=2, scale=20)
    inputs = SoftmaxPattern(q, k, scaling=1.0, causal=True)._inputs(0)
    exact = summarise_blocks(inputs)
    # The same blocks of the same scores, so the same bits: the first row aside, where one key is.
    assert torch.equal(summarise_fused(inputs).entropy[:, 1:], exact.entropy[:, 1:])
    monkeypatch.setattr(softmax_fused, "ENTROPY_ERROR_NATS", math.inf)
    assert not torch.equal(summarise_fused(inputs).entropy[:, 1:], exact.entropy[:, 1:])


def test_hidden_keys_may_hold_anything() -> None:
    q, k = normal(1, 2, 8, 16, seed=1), normal(1, 2, 8, 16, seed=2)
    want = SoftmaxPattern(q, k, scaling=0.25, mask=padding(8, [5])).rows(range(8))
    k[:, :, 5:] = torch.nan
    got = SoftmaxPattern(q, k, scaling=0.25, mask=padding(8, [5]))
    torch.testing.assert_close(got.rows(range(8)), want, rtol=0, atol=WEIGHT)
    assert not got.entropy().isnan().any()
    assert not got.received().isnan().any()


def test_a_query_that_sees_nothing_attends_to_nothing() -> None:
    pattern, _ = build("rows that see nothing")
    assert (pattern.rows([3, 45]) == 0).all()
    assert (pattern.lse()[:, 3] == -torch.inf).all()
    for answer in (pattern.entropy(), pattern.mean_distance(), pattern.sink_mass()):
        assert (answer[:, 40:50] == 0).all()
    with_sink, _ = build("rows that see nothing, sinks")
    assert (with_sink.sink_mass()[:, 40:50] == 1).all()


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator returned with memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "softcap": 20.0},
        {"mask": window(2048, 300)},
        {"mask": additive(window(2048, 2048))},
    ],
    ids=["fused", "blocks", "window", "additive"],
)
def test_no_question_builds_the_matrix(options: dict[str, Any]) -> None:
    q, k = normal(1, 4, 2048, 16, seed=1), normal(1, 2, 2048, 16, seed=2)
    pattern = SoftmaxPattern(q, k, scaling=0.25, **options)
    matrix = 2048 * 2048 * 4
    with _Largest() as row:
        pattern.rows([-1])
    # One row of all heads, or the keys of one layer: whichever is larger.
    assert 0 < row.nbytes <= max(4 * 2048 * 4, 2 * 2048 * 16 * 4)
    with _Largest() as statistics:
        pattern.entropy()
        pattern.mean_distance()
        pattern.received()
        pattern.columns([0])
    assert statistics.operators > 10
    assert statistics.nbytes <= BLOCK_BYTES // 4 < matrix
    with _Largest() as whole:
        pattern.dense()
    assert whole.nbytes == pattern.dense_bytes == 4 * matrix


def test_the_scores_are_summarised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(inputs: Any) -> Any:
        calls.append(inputs)
        return softmax_fused.summarise(inputs)

    monkeypatch.setattr(softmax_pattern, "summarise", counted)
    pattern, _ = build("sinks")
    pattern.rows([3])
    assert not calls
    for _ in range(2):
        pattern.entropy()
        pattern.columns([3])
        pattern.columns([5], head=2)
        pattern.lse()
        pattern.mean_distance()
        pattern.received()
        pattern.sink_mass()
    assert len(calls) == 1
    pattern.entropy(batch=1)
    assert len(calls) == 2


def test_answers_belong_to_the_caller() -> None:
    pattern, want = build("causal")
    for ask in (pattern.entropy, pattern.mean_distance, pattern.received, pattern.lse):
        ask().fill_(7)
    pattern.rows([0]).fill_(7)
    assert_matches(pattern, want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_matches_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    seq_q, seq_k, d_head = (draw(st.integers(1, 24)) for _ in range(3))
    seed = draw(st.integers(0, 2**20))
    options: dict[str, Any] = {
        "scaling": d_head**-0.5,
        "causal": draw(st.booleans()),
        "query_offset": draw(st.integers(0, 5)),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    heads = kv_heads * group
    shape = (
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from([1, seq_q])),
        seq_k,
    )
    kind = draw(st.sampled_from(["none", "bool", "additive"]))
    mask = normal(*shape, seed=seed + 1) > -1
    if kind != "none":
        options["mask"] = mask if kind == "bool" else additive(mask)
    if draw(st.booleans()):
        options["sinks"] = normal(heads, seed=seed + 2)
    if draw(st.booleans()):
        options["bias"] = normal(1, heads, 1, seq_k, seed=seed + 5)
    q = normal(batch, heads, seq_q, d_head, seed=seed + 3)
    k = normal(batch, kv_heads, seq_k, d_head, seed=seed + 4)
    pattern = SoftmaxPattern(q, k, **options)
    assert_matches(pattern, reference(q, k, **options))
    rebuilt = SoftmaxPattern.rebuild(pattern.tensors(), pattern.params())
    assert torch.equal(rebuilt.dense(), pattern.dense())


def test_q_and_k_are_kept_by_reference() -> None:
    q = torch.zeros(1, 5, 4, 8, requires_grad=True).transpose(1, 2)
    pattern = SoftmaxPattern(q, zeros(), scaling=1.0)
    assert pattern.q.data_ptr() == q.data_ptr() and not pattern.q.requires_grad
    assert pattern.nbytes == 2 * q.nbytes
    fused = torch.zeros(3, 1, 4, 5, 8)
    assert SoftmaxPattern(fused[0], fused[1], scaling=1.0).nbytes == fused.nbytes
    assert not pattern.signed
    assert isinstance(pattern, Pattern)


def test_params_are_json_and_rebuild_the_pattern() -> None:
    pattern, want = build("sliding window with sinks, grouped")
    params = json.loads(json.dumps(pattern.params()))
    rebuilt = SoftmaxPattern.rebuild(pattern.tensors(), params)
    assert params["kind"] == "softmax"
    assert_matches(rebuilt, want)


def test_to_keeps_sharing_and_values() -> None:
    mask = window(5, 2)
    patterns = [SoftmaxPattern(zeros(), zeros(), scaling=1.0, mask=mask) for _ in range(2)]
    moved: dict[Any, Tensor] = {}
    first, second = (pattern.to("meta", moved) for pattern in patterns)
    assert first.mask is not None and second.mask is not None
    assert first.mask.device.type == "meta"
    assert len({id(tensor) for tensor in moved.values()}) == 5
    same = patterns[0].to("cpu")
    assert same.q.data_ptr() == patterns[0].q.data_ptr()
    assert torch.equal(same.dense(), patterns[0].dense())


def test_repr_names_the_shape() -> None:
    assert repr(build("sinks")[0]) == (
        "SoftmaxPattern(batch 2, heads 6, seq_q 70, seq_k 70, torch.float32, causal True, "
        "with sinks)"
    )
    assert repr(DensePattern(zeros())) == "DensePattern([1, 4, 5, 8], torch.float32)"


@pytest.mark.parametrize("n", [1, 4, 8])
def test_few_columns_are_as_exact_as_all_at_large_scores(n: int) -> None:
    q, k = (normal(1, 4, 200, 64, seed=seed, scale=4.5) for seed in (1, 2))
    options = {"scaling": 0.125, "causal": True}
    ours = SoftmaxPattern(q, k, **options)
    exact = SoftmaxPattern(q.double(), k.double(), **options).dense()[0]
    all_off = (ours.columns(range(200)).double() - exact).abs().max()
    few = torch.cat([ours.columns(range(at, at + n)) for at in range(0, 200, n)], dim=-1)
    assert few.shape == exact.shape
    assert (few.double() - exact).abs().max() <= 1.5 * all_off
