"""Patterns against a float64 reference that builds the whole matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trilens.caches import softmax_blocks, softmax_fused, softmax_pattern
from trilens.caches.patterns import BLOCK_BYTES, DensePattern, Pattern
from trilens.caches.softmax_fused import fits_fused, summarise_blocks, summarise_fused
from trilens.caches.softmax_masks import SharedMasks, plain_mask
from trilens.caches.softmax_pattern import SoftmaxPattern
from trilens.errors import (
    DtypeError,
    OutOfRangeError,
    ShapeError,
    UsageError,
    ValueRangeError,
)

# Scores of these tests stay below 30. In float32 they are off by 30 · 2⁻²⁴ and a few roundings of
# the product: 5e-6 at most, which is then the relative error of a weight.
WEIGHT = 5e-6
# An entropy weighs errors of scores by p · (s − mean s): a few times more.
NATS = 3e-5
# A mean distance weighs them by the distance, at most the number of keys (100 here).
TOKENS = 3e-4


@dataclass(frozen=True)
class Reference:
    weights: Tensor
    seen: Tensor
    lse: Tensor
    entropy: Tensor
    mean_distance: Tensor
    received: Tensor
    sink_mass: Tensor


def reference(
    q: Tensor,
    k: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    query_offset: int = 0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Reference:
    """Everything about the pattern in float64, row by row as the definitions say it."""
    batch, heads, seq_q, _ = q.shape
    seq_k = k.shape[2]
    repeated = k.double().repeat_interleave(heads // k.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), repeated) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(batch, heads, seq_q, seq_k, dtype=torch.bool)
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.double()
        seen = seen & (mask > torch.finfo(mask.dtype).min / 2)
    i = torch.arange(seq_q)[:, None] + query_offset
    j = torch.arange(seq_k)[None]
    if causal:
        seen = seen & (j <= i)
    powers = torch.where(seen, scores, -torch.inf).exp()
    total = powers.sum(-1, keepdim=True)
    share = torch.where(total > 0, powers / total.clamp(min=1e-300), 0.0)
    sink = torch.zeros(heads, dtype=torch.float64)[None, :, None]
    if sinks is not None:
        sink = sinks.double().exp()[None, :, None]
    mass = total[..., 0] + sink
    sink_mass = torch.where(mass > 0, sink / mass.clamp(min=1e-300), 0.0)
    raw = share * (1 - sink_mass)[..., None]
    return Reference(
        weights=raw,
        seen=seen,
        lse=total[..., 0].log(),
        entropy=-torch.special.xlogy(share, share).sum(-1),
        mean_distance=(share * (i - j).abs()).sum(-1),
        received=raw.sum(2) / seen.sum(2).clamp(min=1),
        sink_mass=sink_mass,
    )


def _normal(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _window(seq: int, width: int) -> Tensor:
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None]
    return ((j <= i) & (j > i - width))[None, None]


def _padding(seq: int, real: list[int]) -> Tensor:
    return (torch.arange(seq)[None] < torch.tensor(real)[:, None])[:, None, None]


def _additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _some_rows_hidden(seq: int) -> Tensor:
    mask = _window(seq, 12).clone()
    mask[..., 3, :] = False
    mask[..., 40:50, :] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "grouped query": {"causal": True, "kv_heads": 2},
    "one key head": {"kv_heads": 1},
    "sliding window": {"mask": _window(70, 9)},
    "sliding window with sinks, grouped": {
        "mask": _window(70, 9),
        "sinks": _normal(6, seed=5),
        "kv_heads": 3,
    },
    "additive mask": {"mask": _additive(_window(70, 70))},
    "additive mask in half precision": {"mask": _additive(_window(70, 70), torch.bfloat16)},
    "additive mask that also weighs": {
        "mask": _additive(_window(70, 30)) + _normal(1, 1, 70, 70, seed=9)
    },
    "minus infinity": {"mask": _additive(_window(70, 70)).clamp(min=-1).log1p()},
    "padding": {"mask": _padding(70, [70, 33]), "causal": True},
    "padding, per query": {"mask": _padding(70, [12, 70]) & _window(70, 20)},
    "mask per head": {"mask": _normal(2, 6, 70, 70, seed=8) > -1, "causal": True},
    "softcap": {"causal": True, "softcap": 4.0},
    "softcap and window": {"mask": _window(70, 9), "softcap": 4.0, "kv_heads": 2},
    "bias": {"bias": _normal(1, 6, 70, 70, seed=7), "scaling": 1.0},
    "bias per prompt, softcap, causal": {
        "bias": _normal(2, 1, 70, 70, seed=7),
        "softcap": 3.0,
        "causal": True,
    },
    "sinks": {"causal": True, "sinks": _normal(6, seed=3)},
    "sinks, softcap": {"causal": True, "sinks": _normal(6, seed=3), "softcap": 2.0},
    "cached keys": {"causal": True, "query_offset": 30, "seq_k": 100},
    "cached keys, window": {
        "mask": _window(100, 9)[..., 30:, :],
        "query_offset": 30,
        "seq_k": 100,
    },
    "cross": {"seq_k": 41},
    "rows that see nothing": {"mask": _some_rows_hidden(70), "sinks": None},
    "rows that see nothing, sinks": {"mask": _some_rows_hidden(70), "sinks": _normal(6, seed=3)},
    "more queries than keys": {"causal": True, "seq_k": 20},
    "one token": {"causal": True, "seq_q": 1, "seq_k": 1},
    "one query": {"seq_q": 1, "query_offset": 69, "causal": True},
    "negative scaling": {"causal": True, "scaling": -0.25},
}


def _build(name: str, dtype: torch.dtype = torch.float32) -> tuple[SoftmaxPattern, Reference]:
    case = dict(CASES[name])
    seq_q, seq_k = case.pop("seq_q", 70), case.pop("seq_k", 70)
    kv_heads = case.pop("kv_heads", 6)
    case.setdefault("scaling", 0.25)
    scale = 0.5 if case["scaling"] == 1.0 else 1.5
    q = _normal(2, 6, seq_q, 16, seed=1, scale=scale).to(dtype)
    # A mean key that is not 0, so that centring has something to do.
    k = (_normal(2, kv_heads, seq_k, 16, seed=2, scale=scale) + 0.5).to(dtype)
    return SoftmaxPattern(q, k, **case), reference(q, k, **case)


def _assert_matches(pattern: Pattern, want: Reference, weight: float = WEIGHT) -> None:
    close = torch.testing.assert_close
    scale = weight / WEIGHT
    for batch in range(pattern.batch):
        rows = pattern.rows(range(pattern.seq_q), batch=batch)
        close(rows.double(), want.weights[batch], rtol=0, atol=weight)
        assert (rows[~want.seen[batch]] == 0).all()
        columns = pattern.columns(range(pattern.seq_k), batch=batch)
        close(columns.double(), want.weights[batch], rtol=0, atol=weight)
        assert (columns[~want.seen[batch]] == 0).all()
        close(pattern.entropy(batch).double(), want.entropy[batch], rtol=0, atol=NATS * scale)
        close(
            pattern.mean_distance(batch).double(),
            want.mean_distance[batch],
            rtol=0,
            atol=TOKENS * scale,
        )
        close(pattern.received(batch).double(), want.received[batch], rtol=0, atol=weight)
        close(pattern.sink_mass(batch).double(), want.sink_mass[batch], rtol=0, atol=weight)
    close(pattern.dense().double(), want.weights, rtol=0, atol=weight)


@pytest.mark.parametrize("name", CASES)
def test_everything_matches_the_float64_reference(name: str) -> None:
    pattern, want = _build(name)
    _assert_matches(pattern, want)
    for batch in range(2):
        torch.testing.assert_close(pattern.lse(batch).double(), want.lse[batch], rtol=0, atol=NATS)


@pytest.mark.parametrize("name", CASES)
def test_float64_stays_float64(name: str) -> None:
    pattern, want = _build(name, torch.float64)
    assert pattern.entropy().dtype == torch.float64
    _assert_matches(pattern, want, weight=WEIGHT * 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "grouped query", "sliding window", "softcap", "sinks"])
def test_half_precision_is_promoted_before_anything_is_computed(
    name: str, dtype: torch.dtype
) -> None:
    # The reference reads the same rounded q and k: no tolerance for half precision is needed.
    pattern, want = _build(name, dtype)
    assert pattern.rows([0]).dtype == torch.float32
    _assert_matches(pattern, want)


@pytest.mark.parametrize("name", CASES)
def test_one_head_is_a_slice_of_all(name: str) -> None:
    pattern, _ = _build(name)
    rows, columns = pattern.rows([0, -1], batch=1), pattern.columns([0, -1], batch=1)
    for head in range(6):
        one = pattern.rows([0, -1], head=head, batch=1)
        # Products of other sizes add up in another order.
        torch.testing.assert_close(one, rows[head : head + 1], rtol=0, atol=WEIGHT)
        assert torch.equal(pattern.columns([0, -1], head, 1), columns[head : head + 1])


@pytest.mark.parametrize("name", ["causal", "full", "grouped query", "one key head", "sinks"])
def test_the_fused_pass_and_the_blocks_agree(name: str) -> None:
    pattern, want = _build(name)
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
    assert not fits_fused(_build(name)[0]._inputs(0))


def test_without_the_fused_operator_the_blocks_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_fused, "_FLASH", None)
    pattern, want = _build("causal")
    assert not fits_fused(pattern._inputs(0))
    _assert_matches(pattern, want)


@pytest.mark.parametrize("common", [0.0, 30.0])
@pytest.mark.parametrize("size", [20.0, 300.0])
def test_large_scores_keep_their_digits(size: float, common: float) -> None:
    # Scores up to `size` · 5, on top of a mean key that adds up to 10 times that.
    q = _normal(1, 2, 256, 64, seed=1, scale=size**0.5)
    k = _normal(1, 2, 256, 64, seed=2, scale=size**0.5)
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
    q, k = _normal(1, 3, 400, 32, seed=1, scale=20), _normal(1, 3, 400, 32, seed=2, scale=20)
    inputs = SoftmaxPattern(q, k, scaling=1.0, causal=True)._inputs(0)
    exact = summarise_blocks(inputs)
    assert torch.equal(summarise_fused(inputs).entropy[:, 1:], exact.entropy[:, 1:])
    monkeypatch.setattr(softmax_fused, "ENTROPY_ERROR_NATS", math.inf)
    assert not torch.equal(summarise_fused(inputs).entropy[:, 1:], exact.entropy[:, 1:])


def test_hidden_keys_may_hold_anything() -> None:
    q, k = _normal(1, 2, 8, 16, seed=1), _normal(1, 2, 8, 16, seed=2)
    want = SoftmaxPattern(q, k, scaling=0.25, mask=_padding(8, [5])).rows(range(8))
    k[:, :, 5:] = torch.nan
    got = SoftmaxPattern(q, k, scaling=0.25, mask=_padding(8, [5]))
    torch.testing.assert_close(got.rows(range(8)), want, rtol=0, atol=WEIGHT)
    assert not got.entropy().isnan().any()
    assert not got.received().isnan().any()


def test_a_query_that_sees_nothing_attends_to_nothing() -> None:
    pattern, _ = _build("rows that see nothing")
    assert (pattern.rows([3, 45]) == 0).all()
    assert (pattern.lse()[:, 3] == -torch.inf).all()
    for answer in (pattern.entropy(), pattern.mean_distance(), pattern.sink_mass()):
        assert (answer[:, 40:50] == 0).all()
    with_sink, _ = _build("rows that see nothing, sinks")
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
        {"mask": _window(2048, 300)},
        {"mask": _additive(_window(2048, 2048))},
    ],
    ids=["fused", "blocks", "window", "additive"],
)
def test_no_question_builds_the_matrix(options: dict[str, Any]) -> None:
    q, k = _normal(1, 4, 2048, 16, seed=1), _normal(1, 2, 2048, 16, seed=2)
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
    pattern, _ = _build("sinks")
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
    pattern, want = _build("causal")
    for ask in (pattern.entropy, pattern.mean_distance, pattern.received, pattern.lse):
        ask().fill_(7)
    pattern.rows([0]).fill_(7)
    _assert_matches(pattern, want)


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
    mask = _normal(*shape, seed=seed + 1) > -1
    if kind != "none":
        options["mask"] = mask if kind == "bool" else _additive(mask)
    if draw(st.booleans()):
        options["sinks"] = _normal(heads, seed=seed + 2)
    if draw(st.booleans()):
        options["bias"] = _normal(1, heads, 1, seq_k, seed=seed + 5)
    q = _normal(batch, heads, seq_q, d_head, seed=seed + 3)
    k = _normal(batch, kv_heads, seq_k, d_head, seed=seed + 4)
    pattern = SoftmaxPattern(q, k, **options)
    _assert_matches(pattern, reference(q, k, **options))
    rebuilt = SoftmaxPattern.rebuild(pattern.tensors(), pattern.params())
    assert torch.equal(rebuilt.dense(), pattern.dense())


# --- unpad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"mask": _padding(12, [12, 7]) & _window(12, 12)},
        {"mask": _additive(_padding(12, [12, 7]) & _window(12, 12))},
        {"mask": _padding(12, [12, 7])},
        {"mask": _padding(12, [12, 7]) & _window(12, 3), "sinks": _normal(4, seed=3)},
        {"mask": _additive(_padding(12, [12, 7])), "bias": _normal(1, 4, 12, 12, seed=6)},
        {"mask": _additive(_window(12, 12)) + _normal(2, 1, 12, 12, seed=6)},
    ],
    ids=["causal", "padded causal", "additive", "encoder", "window", "bias", "weighing mask"],
)
def test_unpadded_is_what_the_prompt_alone_would_be(options: dict[str, Any]) -> None:
    q, k = _normal(2, 4, 12, 8, seed=1), _normal(2, 2, 12, 8, seed=2)
    pattern = SoftmaxPattern(q, k, scaling=0.3, **options)
    for row, n in ((0, 12), (1, 7)):
        one = pattern.unpad(row, n)
        assert (one.batch, one.seq_q, one.seq_k) == (1, n, n)
        torch.testing.assert_close(
            one.dense()[0], pattern.dense()[row, :, :n, :n], rtol=0, atol=WEIGHT
        )
        kept = {tensor.untyped_storage().data_ptr() for tensor in pattern.tensors().values()}
        shared = {"sinks"}
        for name, tensor in one.tensors().items():
            assert name in shared or tensor.untyped_storage().data_ptr() not in kept
            assert name in shared or tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("make", [lambda mask: mask, _additive], ids=["bool", "additive"])
def test_unpadding_drops_a_mask_that_says_no_more_than_causality(make: Any) -> None:
    q, k = _normal(2, 2, 9, 4, seed=1), _normal(2, 2, 9, 4, seed=2)
    causal = SoftmaxPattern(q, k, scaling=1.0, mask=make(_padding(9, [9, 4]) & _window(9, 9)))
    one = causal.unpad(1, 4)
    assert one.mask is None and one.causal
    full = SoftmaxPattern(q, k, scaling=1.0, mask=make(_padding(9, [9, 4]).expand(2, 1, 9, 9)))
    one = full.unpad(1, 4)
    assert one.mask is None and not one.causal
    window = SoftmaxPattern(q, k, scaling=1.0, mask=make(_window(9, 3)))
    assert window.unpad(1, 3).mask is None
    kept = window.unpad(1, 4).mask
    assert kept is not None and kept.dtype == torch.bool and kept.shape == (1, 1, 4, 4)


def test_unpadded_layers_go_on_sharing_their_mask() -> None:
    mask = _padding(9, [9, 6]) & _window(9, 3)
    other = _padding(9, [9, 6]) & _window(9, 4)
    shared = SharedMasks()
    patterns = [
        SoftmaxPattern(_normal(2, 2, 9, 4), _normal(2, 2, 9, 4), scaling=1.0, mask=each)
        for each in (mask, mask[:], other)
    ]
    first, second, third = (pattern.unpad(1, 6, shared).tensors()["mask"] for pattern in patterns)
    assert first.data_ptr() == second.data_ptr() != third.data_ptr()
    row = patterns[0].unpad(0, 9, shared).tensors()["mask"]
    assert row.shape == (1, 1, 9, 9)


def test_an_expanded_mask_is_kept_at_its_own_size() -> None:
    mask = _window(9, 3).expand(2, 4, 9, 9)
    pattern = SoftmaxPattern(_normal(2, 4, 9, 4), _normal(2, 4, 9, 4), scaling=1.0, mask=mask)
    assert pattern.unpad(0, 9).tensors()["mask"].shape == (1, 1, 9, 9)
    assert torch.equal(pattern.dense()[1] != 0, mask[1])


@pytest.mark.parametrize(
    ("row", "n", "error"),
    [(2, 3, OutOfRangeError), (0, 0, ValueRangeError), (0, 10, ValueRangeError)],
)
def test_unpad_refuses_what_is_not_there(row: int, n: int, error: type[Exception]) -> None:
    pattern = SoftmaxPattern(_normal(2, 2, 9, 4), _normal(2, 2, 9, 4), scaling=1.0)
    for each in (pattern, DensePattern(pattern.dense())):
        with pytest.raises(error, match="out of range"):
            each.unpad(row, n)


def test_unpad_refuses_queries_that_are_not_the_keys() -> None:
    pattern = SoftmaxPattern(_normal(1, 2, 3, 4), _normal(1, 2, 9, 4), scaling=1.0, query_offset=6)
    with pytest.raises(UsageError, match="3 queries, 9 keys and query_offset 6"):
        pattern.unpad(0, 3)


def test_plain_mask_keeps_what_it_must() -> None:
    weighing = _additive(_window(5, 5)) - 1
    kept, causal = plain_mask(weighing, seq_q=5, seq_k=5, causal=False)
    assert kept is weighing and not causal
    cached = _window(9, 9)[..., 4:, :]
    assert plain_mask(cached, seq_q=5, seq_k=9, causal=False, query_offset=4) == (None, True)
    kept, causal = plain_mask(cached, seq_q=5, seq_k=9, causal=False, query_offset=3)
    assert kept is cached and not causal
    assert plain_mask(None, seq_q=5, seq_k=9, causal=False) == (None, False)


# --- arguments -----------------------------------------------------------------------------------


def _q() -> Tensor:
    return torch.zeros(1, 4, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"q": torch.zeros(4, 5, 8)}, ShapeError, r"q of shape \[4, 5, 8\]"),
        ({"q": torch.zeros(1, 4, 0, 8)}, ShapeError, "no axis empty"),
        ({"k": torch.zeros(1, 3, 5, 8)}, ShapeError, "4 query heads cannot share 3 key heads"),
        ({"k": torch.zeros(1, 4, 5, 7)}, ShapeError, "d_head have to be equal"),
        ({"k": torch.zeros(2, 4, 5, 8)}, ShapeError, "batch and d_head"),
        ({"k": torch.zeros(1, 4, 5, 8).long()}, DtypeError, "k of dtype torch.int64"),
        ({"k": [1.0]}, UsageError, "k of type list"),
        ({"scaling": math.nan}, ValueRangeError, "scaling nan is out of range"),
        ({"softcap": 0.0}, ValueRangeError, "softcap 0.0 is out of range"),
        ({"query_offset": -1}, ValueRangeError, "query_offset -1 is out of range"),
        ({"mask": torch.ones(1, 1, 5, 6).bool()}, ShapeError, r"\[1 or 1, 1 or 4, 1 or 5, 5\]"),
        ({"mask": torch.ones(5, 5).bool()}, ShapeError, r"mask of shape \[5, 5\]"),
        ({"mask": torch.ones(1, 1, 5, 5).long()}, DtypeError, "bool or floating point"),
        ({"mask": "causal"}, UsageError, "mask of type str"),
        ({"bias": torch.ones(1, 1, 5, 5).bool()}, DtypeError, "bias of dtype torch.bool"),
        ({"sinks": torch.zeros(3)}, ShapeError, r"sinks of shape \[3\]"),
        ({"sinks": torch.zeros(4).long()}, DtypeError, "sinks of dtype"),
        ({"sinks": 0.0}, UsageError, "sinks of type float"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"q": _q(), "k": _q(), "scaling": 1.0, **arguments}
    with pytest.raises(error, match=words):
        SoftmaxPattern(given.pop("q"), given.pop("k"), **given)


@pytest.mark.parametrize("position", [5, -6, 1.0, True, None, "3", torch.tensor(True)])
def test_a_position_that_is_not_there_is_named_with_the_range(position: Any) -> None:
    softmax = SoftmaxPattern(_q(), _q(), scaling=1.0)
    for pattern in (softmax, DensePattern(softmax.dense())):
        with pytest.raises(OutOfRangeError, match="query positions −5–4"):
            pattern.rows([position])
        with pytest.raises(OutOfRangeError, match="key positions −5–4"):
            pattern.columns([0, position])


@pytest.mark.parametrize("question", ["rows", "columns"])
def test_heads_and_batch_rows_count_from_0(question: str) -> None:
    softmax = SoftmaxPattern(_q(), _q(), scaling=1.0)
    for pattern in (softmax, DensePattern(softmax.dense())):
        ask = getattr(pattern, question)
        for head in (4, -1, True):
            with pytest.raises(OutOfRangeError, match="heads 0–3"):
                ask([0], head=head)
        with pytest.raises(OutOfRangeError, match="batch row 1 is out of range"):
            ask([0], batch=1)
        with pytest.raises(UsageError, match="not a sequence"):
            ask(3)


# --- keeping -------------------------------------------------------------------------------------


def test_q_and_k_are_kept_by_reference() -> None:
    q = torch.zeros(1, 5, 4, 8, requires_grad=True).transpose(1, 2)
    pattern = SoftmaxPattern(q, _q(), scaling=1.0)
    assert pattern.q.data_ptr() == q.data_ptr() and not pattern.q.requires_grad
    assert pattern.nbytes == 2 * q.nbytes
    fused = torch.zeros(3, 1, 4, 5, 8)
    assert SoftmaxPattern(fused[0], fused[1], scaling=1.0).nbytes == fused.nbytes
    assert not pattern.signed
    assert isinstance(pattern, Pattern)


def test_params_are_json_and_rebuild_the_pattern() -> None:
    import json

    pattern, want = _build("sliding window with sinks, grouped")
    params = json.loads(json.dumps(pattern.params()))
    rebuilt = SoftmaxPattern.rebuild(pattern.tensors(), params)
    assert params["kind"] == "softmax"
    _assert_matches(rebuilt, want)


def test_to_keeps_sharing_and_values() -> None:
    mask = _window(5, 2)
    patterns = [SoftmaxPattern(_q(), _q(), scaling=1.0, mask=mask) for _ in range(2)]
    moved: dict[Any, Tensor] = {}
    first, second = (pattern.to("meta", moved) for pattern in patterns)
    assert first.mask is not None and second.mask is not None
    assert first.mask.device.type == "meta"
    assert len({id(tensor) for tensor in moved.values()}) == 5
    same = patterns[0].to("cpu")
    assert same.q.data_ptr() == patterns[0].q.data_ptr()
    assert torch.equal(same.dense(), patterns[0].dense())


def test_repr_names_the_shape() -> None:
    assert repr(_build("sinks")[0]) == (
        "SoftmaxPattern(batch 2, heads 6, seq_q 70, seq_k 70, torch.float32, causal True, "
        "with sinks)"
    )
    assert repr(DensePattern(_q())) == "DensePattern([1, 4, 5, 8], torch.float32)"


# --- DensePattern --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["causal", "full", "sliding window", "sinks", "cached keys", "rows that see nothing"]
)
def test_a_stored_pattern_gives_the_same_answers(name: str) -> None:
    _, want = _build(name)
    # The sink's share is what a row lacks to 1, good to a few roundings of 1 in float32.
    _assert_matches(DensePattern(want.weights.float()), want)
    _assert_matches(DensePattern(want.weights), want, weight=WEIGHT * 1e-7)


def test_a_stored_pattern_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, want = _build("sliding window")
    monkeypatch.setattr("trilens.caches.patterns.BLOCK_BYTES", 32 * 6 * 70 * 9)
    _assert_matches(DensePattern(want.weights.float()), want)


def test_a_stored_half_precision_pattern_has_no_sink_of_rounding() -> None:
    _, want = _build("causal")
    assert (DensePattern(want.weights.bfloat16()).sink_mass() == 0).all()
    sinks = _build("sinks")[1]
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
