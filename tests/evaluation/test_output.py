"""Outside: KL, top tokens, perplexity, against slow and independent sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tolerances import largest, sum_error
from trilens.errors import NonFiniteError, ShapeError, UsageError, ValueRangeError
from trilens.evaluation.output import OutputAccumulator, OutputResult


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compared(*prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> OutputResult:
    tally = OutputAccumulator()
    for before, after, ids in prompts:
        tally.add(before, after, ids)
    return tally.result()


def prompts(vocab: int, lengths: tuple[int, ...] = (7, 12, 30)) -> list[tuple[torch.Tensor, ...]]:
    found = []
    for seed, n in enumerate(lengths):
        before = logits(n, vocab, seed=seed)
        after = before + logits(n, vocab, seed=seed + 100, scale=0.5)
        ids = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
        found.append((before, after, ids))
    return found


@pytest.mark.parametrize("vocab", [3, 50, 641, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_are_those_of_a_slow_reference(vocab: int, dtype: torch.dtype) -> None:
    cases = [(a.to(dtype), b.to(dtype), ids) for a, b, ids in prompts(vocab)]
    result = compared(*cases)
    kl, nll, right, top1, top5 = [], [], [], [], []
    k = min(5, vocab)
    for before, after, ids in cases:
        p, q = (x[:-1].float().double().log_softmax(-1) for x in (before, after))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        own = [x.gather(1, ids[1:, None])[:, 0] for x in (p, q)]
        nll.append([-x.sum().item() for x in own])
        right += (own[1].exp() - own[0].exp()).tolist()
        top1 += (p.argmax(-1) == q.argmax(-1)).tolist()
        for a, b in zip(p, q, strict=True):
            top5.append(len(set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())) / k)
    assert result.n_tokens == len(kl) == 6 + 11 + 29
    # Each of two log-softmaxes is off by a float32 sum over the vocabulary, of 1, and by the
    # roundings of its logits; KL is a sum of their differences, weighed by probabilities.
    top = max(largest(x.float()) for before, after, _ in cases for x in (before, after))
    nats = float(sum_error(vocab, 2, torch.float32) + sum_error(4, top, torch.float32))
    np.testing.assert_allclose(result.token_kl_nats, kl, rtol=1e-5, atol=nats)
    lengths = np.array([[len(ids) - 1] for *_, ids in cases])
    assert (np.abs(result.prompt_nll_nats - np.array(nll)) <= nats * lengths).all()
    assert result.kl_nats_mean == pytest.approx(np.mean(kl), rel=1e-5, abs=nats)
    assert result.kl_nats_median == pytest.approx(np.median(kl), rel=1e-5, abs=nats)
    assert result.perplexity_before == pytest.approx(
        math.exp(np.sum(nll, 0)[0] / len(kl)), rel=nats
    )
    assert result.target_probability_rms_change == pytest.approx(
        np.sqrt(np.mean(np.square(right))), rel=1e-5, abs=nats
    )
    if dtype != torch.bfloat16:  # bfloat16 logits are full of ties
        assert result.same_top1 == pytest.approx(np.mean(top1))
        assert result.same_top5 == pytest.approx(np.mean(top5))


def test_equal_logits_are_exactly_equal() -> None:
    result = compared(*[(a, a.clone(), ids) for a, _, ids in prompts(5000)])
    assert not result.token_kl_nats.any()
    assert (result.kl_nats_mean, result.kl_nats_p99, result.kl_nats_max) == (0, 0, 0)
    assert (result.same_top1, result.same_top5) == (1, 1)
    assert result.target_probability_rms_change == 0
    assert result.nll_nats_before == result.nll_nats_after
    assert result.nll_interval_change is not None
    assert (result.nll_interval_change.low, result.nll_interval_change.high) == (0, 0)


def test_a_constant_added_to_all_logits_changes_nothing_much() -> None:
    (before, _, ids), *_ = prompts(5000)
    result = compared((before, before + 8.0, ids))
    # The sums are rounded alike on both sides, the logits are not: they carry 8 on one.
    assert result.kl_nats_max < sum_error(4, 8 + largest(before), torch.float32)


def test_a_token_that_only_after_excludes_costs_infinity() -> None:
    (before, _, ids), *_ = prompts(50)
    after = before.clone()
    after[:, 3] = -math.inf
    both = compared((after, after.clone(), ids.clamp(min=4)))
    assert both.kl_nats_max == 0
    assert compared((before, after, ids.clamp(min=4))).kl_nats_mean == math.inf
    assert compared((after, before, ids.clamp(min=4))).kl_nats_mean < math.inf


def test_the_interval_covers_the_mean_and_is_seeded() -> None:
    cases = prompts(50, tuple(range(4, 30)))
    result, again = compared(*cases), compared(*cases)
    interval = result.nll_interval_before
    assert interval is not None and result.nll_nats_before is not None
    assert interval.low < result.nll_nats_before < interval.high
    assert interval == again.nll_interval_before
    # Pairing pays: the change is known better than either of the two.
    change = result.nll_interval_change
    assert change is not None
    assert change.high - change.low < interval.high - interval.low
    assert compared(cases[0]).nll_interval_before is None


def test_without_next_tokens_every_position_counts() -> None:
    (before, after, ids), *_ = prompts(50)
    tally = OutputAccumulator(next_token=False)
    tally.add(before, after, ids)
    result = tally.result()
    assert result.n_tokens == len(ids)
    assert result.perplexity_before is None and result.perplexity_ratio is None
    assert result.target_probability_rms_change is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_names_model_and_token_and_leaves_nothing_behind(bad: float, side: int) -> None:
    (before, after, ids), other, *_ = prompts(5000)
    pair = [before.clone(), after.clone()]
    pair[side][4, 4321] = bad
    tally = OutputAccumulator()
    with pytest.raises(NonFiniteError, match=rf"{('before', 'after')[side]}.*token 4"):
        tally.add(pair[0], pair[1], ids)
    tally.add(*other)
    assert tally.result().n_prompts == 1
    assert tally.n_tokens == len(other[2]) - 1


def test_what_does_not_fit_is_refused() -> None:
    (before, after, ids), *_ = prompts(50)
    tally = OutputAccumulator()
    with pytest.raises(UsageError, match="nothing was compared"):
        tally.result()
    with pytest.raises(ShapeError, match=r"\[7, 50\] before and \[7, 49\] after"):
        tally.add(before, after[:, :49], ids)
    with pytest.raises(ShapeError, match="one id for each of 7"):
        tally.add(before, after, ids[:3])
    with pytest.raises(ShapeError, match="nothing to compare: it needs 2"):
        tally.add(before[:1], after[:1], ids[:1])
    with pytest.raises(ValueRangeError, match="out of range"):
        tally.add(before, after, ids + 49)
    tally.add(before, after, ids)
    with pytest.raises(ShapeError, match="over 49 tokens"):
        tally.add(before[:, :49], after[:, :49], ids.clamp(max=48))
