"""Masks made plain, and prompts cut out of a padded batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pattern_cases import (
    WEIGHT,
    additive,
    assert_matches,
    normal,
    padding,
    reference,
    window,
    zeros,
)
from trilens.caches.patterns.protocol import DensePattern
from trilens.caches.patterns.softmax import fused as softmax_fused
from trilens.caches.patterns.softmax import masks as softmax_masks
from trilens.caches.patterns.softmax import pattern as softmax_pattern
from trilens.caches.patterns.softmax.fused import fits_fused
from trilens.caches.patterns.softmax.masks import SharedMasks, implied_causality, plain_mask
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.errors import (
    DtypeError,
    OutOfRangeError,
    ShapeError,
    UsageError,
    ValueRangeError,
)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"mask": padding(12, [12, 7]) & window(12, 12)},
        {"mask": additive(padding(12, [12, 7]) & window(12, 12))},
        {"mask": padding(12, [12, 7])},
        {"mask": padding(12, [12, 7]) & window(12, 3), "sinks": normal(4, seed=3)},
        {"mask": additive(padding(12, [12, 7])), "bias": normal(1, 4, 12, 12, seed=6)},
        {"mask": additive(window(12, 12)) + normal(2, 1, 12, 12, seed=6)},
    ],
    ids=["causal", "padded causal", "additive", "encoder", "window", "bias", "weighing mask"],
)
def test_unpadded_is_what_the_prompt_alone_would_be(options: dict[str, Any]) -> None:
    q, k = normal(2, 4, 12, 8, seed=1), normal(2, 2, 12, 8, seed=2)
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


@pytest.mark.parametrize("make", [lambda mask: mask, additive], ids=["bool", "additive"])
def test_unpadding_drops_a_mask_that_says_no_more_than_causality(make: Any) -> None:
    q, k = normal(2, 2, 9, 4, seed=1), normal(2, 2, 9, 4, seed=2)
    causal = SoftmaxPattern(q, k, scaling=1.0, mask=make(padding(9, [9, 4]) & window(9, 9)))
    one = causal.unpad(1, 4)
    assert one.mask is None and one.causal
    full = SoftmaxPattern(q, k, scaling=1.0, mask=make(padding(9, [9, 4]).expand(2, 1, 9, 9)))
    one = full.unpad(1, 4)
    assert one.mask is None and not one.causal
    cut = SoftmaxPattern(q, k, scaling=1.0, mask=make(window(9, 3)))
    assert cut.unpad(1, 3).mask is None
    kept = cut.unpad(1, 4).mask
    assert kept is not None and kept.dtype == torch.bool and kept.shape == (1, 1, 4, 4)


def test_unpadded_layers_go_on_sharing_their_mask() -> None:
    mask = padding(9, [9, 6]) & window(9, 3)
    other = padding(9, [9, 6]) & window(9, 4)
    shared = SharedMasks()
    patterns = [
        SoftmaxPattern(normal(2, 2, 9, 4), normal(2, 2, 9, 4), scaling=1.0, mask=each)
        for each in (mask, mask[:], other)
    ]
    first, second, third = (pattern.unpad(1, 6, shared).tensors()["mask"] for pattern in patterns)
    assert first.data_ptr() == second.data_ptr() != third.data_ptr()
    row = patterns[0].unpad(0, 9, shared).tensors()["mask"]
    assert row.shape == (1, 1, 9, 9)


def test_prompts_of_one_length_keep_their_own_masks() -> None:
    mask = normal(2, 1, 9, 9, seed=1) > 0
    bias = normal(2, 1, 9, 9, seed=2)
    q, k = normal(2, 2, 9, 4, seed=3), normal(2, 2, 9, 4, seed=4)
    pattern = SoftmaxPattern(q, k, scaling=1.0, mask=mask, bias=bias)
    shared = SharedMasks()
    for row in (0, 1):
        cut = pattern.unpad(row, 6, shared)
        assert torch.equal(cut.tensors()["mask"][0, 0], mask[row, 0, :6, :6])
        assert torch.equal(cut.tensors()["bias"][0, 0], bias[row, 0, :6, :6])


def test_an_expanded_mask_is_kept_at_its_own_size() -> None:
    mask = window(9, 3).expand(2, 4, 9, 9)
    pattern = SoftmaxPattern(normal(2, 4, 9, 4), normal(2, 4, 9, 4), scaling=1.0, mask=mask)
    assert pattern.unpad(0, 9).tensors()["mask"].shape == (1, 1, 9, 9)
    assert torch.equal(pattern.dense()[1] != 0, mask[1])


@pytest.mark.parametrize(
    ("row", "n", "error"),
    [(2, 3, OutOfRangeError), (0, 0, ValueRangeError), (0, 10, ValueRangeError)],
)
def test_unpad_refuses_what_is_not_there(row: int, n: int, error: type[Exception]) -> None:
    pattern = SoftmaxPattern(normal(2, 2, 9, 4), normal(2, 2, 9, 4), scaling=1.0)
    for each in (pattern, DensePattern(pattern.dense())):
        with pytest.raises(error, match="out of range"):
            each.unpad(row, n)


def test_unpad_refuses_queries_that_are_not_the_keys() -> None:
    pattern = SoftmaxPattern(normal(1, 2, 3, 4), normal(1, 2, 9, 4), scaling=1.0, query_offset=6)
    with pytest.raises(UsageError, match="3 queries, 9 keys and query_offset 6"):
        pattern.unpad(0, 3)


def test_plain_mask_keeps_what_it_must() -> None:
    weighing = additive(window(5, 5)) - 1
    kept, causal = plain_mask(weighing, seq_q=5, seq_k=5, causal=False)
    assert kept is weighing and not causal
    cached = window(9, 9)[..., 4:, :]
    assert plain_mask(cached, seq_q=5, seq_k=9, causal=False, query_offset=4) == (None, True)
    kept, causal = plain_mask(cached, seq_q=5, seq_k=9, causal=False, query_offset=3)
    assert kept is cached and not causal
    assert plain_mask(None, seq_q=5, seq_k=9, causal=False) == (None, False)


# --- masks that say no more than causality -------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_implied_causality_is_found_exactly_where_it_holds(data: st.DataObject) -> None:
    draw = data.draw
    seq_q, seq_k, offset = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 3))
    past = torch.arange(seq_k) <= torch.arange(seq_q)[:, None] + offset
    mask = draw(st.sampled_from([past, torch.ones_like(past), past & False]))[None, None].clone()
    if draw(st.booleans()):
        mask[..., draw(st.integers(0, seq_q - 1)), draw(st.integers(0, seq_k - 1))] ^= True
    if draw(st.booleans()):
        mask = mask[:, :, :1]
    causal = draw(st.booleans())
    given_ = additive(mask) if draw(st.booleans()) else mask
    got = implied_causality(given_, seq_q=seq_q, seq_k=seq_k, causal=causal, query_offset=offset)
    seen = (mask & past) if causal else mask.expand(1, 1, seq_q, seq_k)
    if got is None:
        assert not torch.equal(seen[0, 0], past) and not seen.all()
    else:
        assert torch.equal(seen[0, 0], past if got else torch.ones_like(past))


def test_an_additive_mask_that_weighs_is_never_idle() -> None:
    for mask in (additive(window(5, 5)) - 1, torch.full((1, 1, 5, 5), 0.5)):
        assert implied_causality(mask, seq_q=5, seq_k=5, causal=False) is None
        assert implied_causality(mask, seq_q=5, seq_k=5, causal=True) is None
    # What it says of hidden keys has no meaning.
    late = torch.full((5, 5), 0.5).triu(1)[None, None]
    assert implied_causality(late, seq_q=5, seq_k=5, causal=True) is True
    assert implied_causality(late, seq_q=5, seq_k=5, causal=False) is None


@pytest.mark.parametrize("make", [lambda mask: mask, additive], ids=["bool", "additive"])
def test_an_idle_mask_takes_the_fused_way(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_masks, "_SCAN_BYTES", 70 * 4 * 16)
    asked = []

    def noted(inputs: Any) -> Any:
        asked.append(fits_fused(inputs))
        return softmax_fused.summarise(inputs)

    monkeypatch.setattr(softmax_pattern, "summarise", noted)
    q, k = normal(1, 2, 70, 8, seed=1), normal(1, 2, 70, 8, seed=2)
    for mask in (window(70, 70), window(70, 69), padding(70, [70])):
        options = {"scaling": 0.4, "mask": make(mask)}
        assert_matches(SoftmaxPattern(q, k, **options), reference(q, k, **options))
    assert asked == [True, False, True]


# --- arguments -----------------------------------------------------------------------------------


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
    given = {"q": zeros(), "k": zeros(), "scaling": 1.0, **arguments}
    with pytest.raises(error, match=words):
        SoftmaxPattern(given.pop("q"), given.pop("k"), **given)


@pytest.mark.parametrize("position", [5, -6, 1.0, True, None, "3", torch.tensor(True)])
def test_a_position_that_is_not_there_is_named_with_the_range(position: Any) -> None:
    softmax = SoftmaxPattern(zeros(), zeros(), scaling=1.0)
    for pattern in (softmax, DensePattern(softmax.dense())):
        with pytest.raises(OutOfRangeError, match="query positions −5–4"):
            pattern.rows([position])
        with pytest.raises(OutOfRangeError, match="key positions −5–4"):
            pattern.columns([0, position])


@pytest.mark.parametrize("question", ["rows", "columns"])
def test_heads_and_batch_rows_count_from_0(question: str) -> None:
    softmax = SoftmaxPattern(zeros(), zeros(), scaling=1.0)
    for pattern in (softmax, DensePattern(softmax.dense())):
        ask = getattr(pattern, question)
        for head in (4, -1, True):
            with pytest.raises(OutOfRangeError, match="heads 0–3"):
                ask([0], head=head)
        with pytest.raises(OutOfRangeError, match="batch row 1 is out of range"):
            ask([0], batch=1)
        with pytest.raises(UsageError, match="not a sequence"):
            ask(3)
