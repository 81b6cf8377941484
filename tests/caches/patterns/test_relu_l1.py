"""ReluL1Pattern: the unsigned view of a signed pattern."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from recurrent_cases import normal, unit
from tolerances import assert_close_sums, sum_error
from trilens.caches.attention import AttentionCache, rebuild_pattern
from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern
from trilens.caches.patterns.relu_l1 import ReluL1Pattern
from trilens.errors import OutOfRangeError, UsageError

SEQ = 90


def signed() -> RecurrentPattern:
    q, k, key = (normal(2, 3, SEQ, 8, seed=i) for i in range(3))
    q[:, :, 40] = 0  # a row of zeros
    k[0, 1] = k[0, 1].abs()
    q[0, 1] = -q[0, 1].abs()  # a head without a positive weight, as far as its removal keys let it
    return RecurrentPattern(
        q, k, log_w=-0.1 * normal(2, 3, SEQ, 1, seed=3).abs(), a=-unit(key), b=unit(key)
    )


def reference(raw: Tensor) -> Tensor:
    positive = raw.double().clamp(min=0)
    mass = positive.sum(-1, keepdim=True)
    return torch.where(mass > 0, positive / mass.clamp(min=1e-300), 0.0)


def check(view: Pattern, raw: Tensor, visible: Tensor) -> None:
    """Every answer about every prompt, against float64; weights are at most 1, in float32."""
    want = reference(raw)
    seq = want.shape[-1]
    # A share of a row that is added up to 1, and a raw weight that is a product of two ways
    # through the recurrence, off by some roundings of the row's largest: the mass of a row that is
    # mostly negative makes these larger.
    rounded = float(sum_error(seq, 1, torch.float32))
    assert_close_sums(view.dense(), want, 1.0, seq, torch.float32)
    gap = (torch.arange(seq)[:, None] - torch.arange(seq)).abs()
    for batch in range(view.batch):
        own = want[batch]
        mass = raw[batch].double().clamp(min=0).sum(-1, keepdim=True)
        bad = (raw[batch].abs().amax(-1, keepdim=True) / mass).nan_to_num(0).clamp(min=1)
        bound = rounded * bad
        rows = view.rows(range(seq), batch=batch)
        assert ((rows.double() - own).abs() <= bound).all()
        sums = rows.sum(-1)
        assert (((sums - 1).abs() <= rounded) | (sums == 0)).all()
        columns = view.columns(range(seq), batch=batch).double()
        assert ((columns - own).abs() <= bound).all()
        one = view.columns([3], view.heads - 1, batch)[0, :, 0].double()
        assert ((one - own[-1, :, 3]).abs() <= bound[-1, :, 0]).all()
        # Errors of a row's shares add up to its bound, weighed by ln p + 1 or by the distance.
        entropy = torch.special.entr(own).sum(-1)
        off = (view.entropy(batch).double() - entropy).abs()
        assert (off <= bound[..., 0] * math.log(seq)).all()
        distance = (own * gap).sum(-1)
        off = (view.mean_distance(batch).double() - distance).abs()
        assert (off <= bound[..., 0] * seq).all()
        received = own.sum(1) / visible.sum(-2).clamp(min=1)[batch]
        off = (view.received(batch).double() - received).abs()
        assert (off <= bound.amax(1)).all()
        assert (view.sink_mass(batch) == 0).all()


@pytest.mark.parametrize("block_bytes", [2**25, 3 * 3 * SEQ * 4 * 7])
def test_the_view_of_a_recurrence(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr("trilens.caches.patterns.relu_l1.BLOCK_BYTES", block_bytes)
    pattern = signed()
    raw = pattern.dense()
    assert (raw < 0).any() and (raw[:, :, 40] == 0).all()
    view = pattern.relu_l1()
    assert isinstance(view, Pattern) and not view.signed and view.base is pattern
    causal = torch.ones(SEQ, SEQ).tril().expand_as(raw)
    check(view, raw, causal)


def test_the_view_of_a_stored_pattern() -> None:
    raw = normal(2, 3, SEQ, SEQ)
    raw = torch.where(raw.abs() < 0.5, 0, raw).tril()
    check(ReluL1Pattern(DensePattern(raw)), raw, raw != 0)


def test_through_a_cache() -> None:
    cache = AttentionCache()
    cache.push(torch.tensor([[[[1.0, 0.0], [-0.5, 0.25]]]]))
    cache.push(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
    with pytest.raises(UsageError, match=r"relu_l1\(\)"):
        cache.entropy(0)
    view = cache.relu_l1()
    np.testing.assert_array_equal(view.attention_from_position(0, 1), [0, 1])
    np.testing.assert_array_equal(view.attention_to_position(0, 0), [1, 0])
    np.testing.assert_array_equal(view.entropy(0), [[0, 0]])
    np.testing.assert_allclose(view.received(0), [[0.5, 1]])
    assert view.pattern(1) is cache.pattern(1)
    dense = view.get_layer(0)
    assert dense is not None and dense.tolist() == [[[[1, 0], [0, 1]]]]


def test_unpadded_rebuilt_and_moved() -> None:
    pattern = signed()
    view = pattern.relu_l1()
    dense = view.dense()
    one = view.unpad(1, 30)
    raw = pattern.dense()[1:, :, :30, :30]
    mass = raw.clamp(min=0).sum(-1, keepdim=True)
    terms = (raw.abs().amax(-1, keepdim=True) / mass).nan_to_num(0).clamp(min=1)
    assert_close_sums(one.dense(), dense[1:, :, :30, :30], terms, SEQ, torch.float32)
    rebuilt = rebuild_pattern(view.tensors(), view.params())
    assert isinstance(rebuilt, ReluL1Pattern)
    assert torch.equal(rebuilt.dense(), dense)
    assert torch.equal(rebuilt.received(1), view.received(1))
    assert torch.equal(view.to("cpu").dense(), dense)
    assert (view.nbytes, view.dense_bytes) == (pattern.nbytes, pattern.dense_bytes)
    assert "ReluL1Pattern(RecurrentPattern" in repr(view)


def test_answers_are_the_callers_own() -> None:
    view = signed().relu_l1()
    for question in (view.entropy, view.mean_distance, view.received):
        question(0).fill_(-1)
        assert (question(0) >= 0).all()


def test_prompts_that_are_not_there() -> None:
    with pytest.raises(OutOfRangeError, match="batch row 2 is out of range"):
        signed().relu_l1().entropy(2)
