"""Inside, part by part: residual, attention, heads, gates, logit lens, weights, conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodels import build, prompt_ids
from tolerances import sum_error
from trilens.analysis.comparison.attention import (
    EFFECTIVE,
    SOFTMAX,
    AttentionAccumulator,
)
from trilens.analysis.comparison.conditions import parse_condition
from trilens.analysis.comparison.gates import GateAccumulator
from trilens.analysis.comparison.heads import ROLES, RoleAccumulator, repeated_probe
from trilens.analysis.comparison.logit_lens import convergence_layers
from trilens.analysis.comparison.residual import ResidualAccumulator
from trilens.analysis.comparison.rows import METRICS, Row
from trilens.analysis.comparison.weights import matrix_shapes, weight_rows
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import DensePattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern
from trilens.errors import IncomparableError, NotStoredError, ShapeError, UsageError
from trilens.lens.lens import Lens
from trilens.statistics.divergence import cosine, js_nats, js_nats_of_rows
from trilens.statistics.gating import GatingAccumulator
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value(rows: list[Row], metric: str, head: int | None = None) -> Row:
    (found,) = [row for row in rows if row.metric == metric and row.head == head]
    return found


@pytest.fixture(scope="module")
def llama() -> tuple[Lens, Lens]:
    return Lens(build("llama")), Lens(build("llama", seed=1))


def test_residual_is_that_of_the_metrics() -> None:
    tally = ResidualAccumulator()
    pairs = [(random(n, 8, seed=n), random(n, 8, seed=n + 50)) for n in (3, 9)]
    for before, after in pairs:
        tally.add(2, before, after)
    rows = tally.rows()
    angles = np.concatenate([cosine(a, b) for a, b in pairs])
    assert value(rows, "cosine").after == pytest.approx(angles.mean(), abs=1e-12)
    last = np.mean([cosine(a, b)[-1] for a, b in pairs])
    assert value(rows, "cosine_last").after == pytest.approx(last, abs=1e-12)
    errors = [(a - b).double().square().sum(-1) / a.double().square().sum(-1) for a, b in pairs]
    expected = torch.cat(errors).mean()
    assert value(rows, "relative_error").after == pytest.approx(float(expected), rel=1e-6)
    assert {row.layer for row in rows} == {2}


def test_residuals_that_nearly_agree_keep_their_digits() -> None:
    before = torch.zeros(1, 4, dtype=torch.float64)
    before[0, 0] = 1.0
    after = before.clone()
    after[0, 1] = 1e-6
    tally = ResidualAccumulator()
    tally.add(0, before, after)
    assert value(tally.rows(), "cosine").delta == pytest.approx(-0.5e-12, rel=1e-3)
    assert value(tally.rows(), "relative_error").delta == pytest.approx(1e-12, rel=1e-6)


def test_zero_residuals_are_equal_and_any_other_has_no_angle() -> None:
    tally = ResidualAccumulator()
    tally.add(0, torch.zeros(2, 4), torch.zeros(2, 4))
    assert value(tally.rows(), "cosine").delta == 0
    tally = ResidualAccumulator()
    tally.add(0, torch.zeros(2, 4), torch.ones(2, 4))
    assert value(tally.rows(), "cosine").after == 0
    assert value(tally.rows(), "relative_error").after == math.inf
    with pytest.raises(ShapeError, match="layer 1"):
        tally.add(1, torch.ones(2, 4), torch.ones(3, 4))


@given(st.integers(2, 40), st.integers(0, 1000), st.floats(0, 4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_divergence_of_rows_is_that_of_the_metrics(
    n: int, seed: int, scale: float, zeros: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(5, n, generator=generator) * scale for _ in range(2))
    hidden = torch.rand(5, n, generator=generator) < zeros * 0.9
    hidden[:, 0] = False
    p, q = (x.masked_fill(hidden, -math.inf).softmax(-1) for x in (p, q))
    # Float32 against float64: two sums of n shares of 1, each times a rounded logarithm.
    close = float(sum_error(2 * n + 8, 1, torch.float32))
    np.testing.assert_allclose(js_nats_of_rows(p, q), js_nats(p, q), atol=close)


def test_divergence_of_rows_at_its_ends() -> None:
    one, other = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    assert float(js_nats_of_rows(one, other)) == pytest.approx(math.log(2), abs=1e-6)
    p = torch.full((1, 4), 0.25)
    assert float(js_nats_of_rows(p, p.clone())) == 0
    q = p + torch.tensor([[1e-4, -1e-4, 0, 0]])
    # A difference of logarithms in float32 would say anything from 0 to 1e-7 here.
    assert float(js_nats_of_rows(p, q)) == pytest.approx(float(js_nats(p, q)[0]), rel=1e-2)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0])])
def test_attention_statistics_are_those_of_the_cache(sinks: torch.Tensor | None) -> None:
    def pattern(seed: int) -> SoftmaxPattern:
        q, k = (random(1, 3, 50, 8, seed=seed + i) for i in (0, 10))
        return SoftmaxPattern(q, k, scaling=0.5, causal=True, sinks=sinks)

    before, after = pattern(0), pattern(1)
    tally = AttentionAccumulator()
    tally.add(4, SOFTMAX, before, after)
    rows = tally.rows()
    caches = [AttentionCache.from_layers({4: p}, n_model_layers=5) for p in (before, after)]
    questions = {
        "entropy_nats": AttentionCache.entropy,
        "distance_tokens": AttentionCache.mean_distance,
        "sink_mass": AttentionCache.sink_mass,
    }
    dense = [p.dense()[0] for p in (before, after)]
    shares = [each / each.sum(-1, keepdim=True) for each in dense]
    # Rows of 50 keys that add up to 1, their mean over 50 queries, of scores of 8 products.
    close = float(sum_error(50, 2, torch.float32) + sum_error(8, 8, torch.float32))
    for head in range(3):
        for metric, ask in questions.items():
            row = value(rows, metric, head)
            for cache, got in zip(caches, (row.before, row.after), strict=True):
                answer = ask(cache, 4)[head]
                error = close * max(1.0, float(answer.max()))
                assert got == pytest.approx(float(answer.mean()), abs=error)
        row = value(rows, "first_token_mass", head)
        assert row.after == pytest.approx(float(dense[1][head, :, 0].mean()), abs=close)
        expected = js_nats(shares[0][head], shares[1][head]).mean()
        assert value(rows, "js_nats", head).after == pytest.approx(expected, abs=close)


def test_blocks_of_attention_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random(1, 4, 37, 8, seed=1), random(1, 2, 37, 8, seed=2)
    pair = [SoftmaxPattern(x, k, scaling=0.5, causal=True) for x in (q, 2 * q)]
    whole = AttentionAccumulator()
    whole.add(0, SOFTMAX, *pair)
    module = "trilens.analysis.comparison.attention"
    monkeypatch.setattr(f"{module}._BLOCK_BYTES", 4 * 37 * 5)
    monkeypatch.setattr(f"{module}._MANY_BYTES", 4 * 37)
    cut = AttentionAccumulator()
    cut.add(0, SOFTMAX, *pair)
    for one, other in zip(whole.rows(), cut.rows(), strict=True):
        assert one.metric == other.metric and one.head == other.head
        # Scores of 8 products, rows of 37 keys, means over 37 queries.
        close = float(sum_error(37, 2, torch.float32) + sum_error(8, 16, torch.float32))
        assert one.after == pytest.approx(other.after, abs=close * max(1.0, abs(other.after)))


def test_other_heads_are_refused_by_name() -> None:
    patterns = [SoftmaxPattern(*[random(1, h, 5, 8)] * 2, scaling=1.0) for h in (2, 4)]
    with pytest.raises(IncomparableError, match=r"layer 3 .*\[2, 5, 5\] before and \[4, 5, 5\]"):
        AttentionAccumulator().add(3, SOFTMAX, *patterns)


def test_of_a_recurrence_some_queries_count_the_last_among_them() -> None:
    n = 100
    weights = torch.eye(n)[None, None]
    moved = weights.clone()
    moved[0, 0, -1] = weights[0, 0, 0]
    tally = AttentionAccumulator()
    tally.add(0, EFFECTIVE, DensePattern(weights), DensePattern(moved))
    assert value(tally.rows(), "js_nats", 0).after == pytest.approx(math.log(2) / 32, rel=1e-5)
    assert not [row for row in tally.rows() if row.metric == "sink_mass"]


def test_head_scores_read_the_three_diagonals() -> None:
    probes = repeated_probe(build("llama"))
    n, half = len(probes[0]), (len(probes[0]) - 1) // 2
    assert torch.equal(probes[0][n - 2 * half : n - half], probes[0][n - half :])
    assert len({tuple(p.tolist()) for p in probes}) == len(probes)
    heads = torch.zeros(1, 3, n, n)
    for t in range(1, n):
        heads[0, 0, t, t - 1] = 1
    for t in range(n - half, n):
        heads[0, 1, t, t - half] = 1
        heads[0, 2, t, t - half + 1] = 1
    tally = RoleAccumulator()
    tally.add(5, SOFTMAX, probes[0], DensePattern(heads), DensePattern(heads.flip(1)))
    rows = tally.rows()
    assert value(rows, "previous_token_score", 0).before == 1
    assert value(rows, "duplicate_token_score", 1).before == 1
    assert value(rows, "induction_score", 2).before == 1
    assert value(rows, "induction_score", 0).after == 1
    changes = {(each.head, each.role): each.lost for each in tally.changes(0.5)}
    assert changes == {
        (0, "previous_token"): True,
        (2, "previous_token"): False,
        (2, "induction"): True,
        (0, "induction"): False,
    }


def test_gates_have_the_statistics_of_the_analysis(llama: tuple[Lens, Lens]) -> None:
    prompts = [prompt_ids("llama", n, seed=n) for n in (9, 30)]
    tally = GateAccumulator(0.45)
    slow = [GatingAccumulator(0.45) for _ in llama]
    for ids in prompts:
        gates = [lens.capture(ids, gates=True).gates for lens in llama]
        assert gates[0] is not None and gates[1] is not None
        tally.add("mlp.gate", 1, gates[0], gates[1])
        for each, cache in zip(slow, gates, strict=True):
            each.update(cache.openness("mlp.gate", 1))
    before, after = (each.result() for each in slow)
    rows = tally.rows()
    assert value(rows, "openness").after == pytest.approx(after.avg_gate.mean(), rel=1e-6)
    assert (value(rows, "dead").before, value(rows, "dead").after) == (
        len(before.dead_gates),
        len(after.dead_gates),
    )
    new = set(after.dead_gates) - set(before.dead_gates)
    assert value(rows, "newly_dead").after == len(new) > 0
    new = set(after.saturated_gates) - set(before.saturated_gates)
    assert value(rows, "newly_saturated").after == len(new)
    assert value(rows, "effective_capacity").before == pytest.approx(before.effective_capacity())
    (units,) = tally.units()
    np.testing.assert_allclose(units.before, before.avg_gate, rtol=1e-6)


def test_memory_horizon_of_a_decay() -> None:
    lens = Lens(build("mamba"))
    cache = lens.capture(prompt_ids("mamba", 20), gates=True).gates
    assert cache is not None
    tally = GateAccumulator(0.1)
    tally.add("mixer.decay", 0, cache, cache)
    decay = cache.get("mixer.decay", 0).double().log().mean(0)
    # An even number of channels: the mean of the two in the middle.
    expected = float(np.median((1 / (1 - decay.exp())).numpy()))
    assert decay.numel() % 2 == 0
    row = value(tally.rows(), "horizon_tokens")
    # A decay in float32 is off by half an eps, and 1/(1 − w) by its square times that.
    error = float(sum_error(4, expected**2, torch.float32))
    assert row.before == pytest.approx(expected, abs=error)
    assert row.delta == 0


def test_a_position_settles_where_its_top_token_stays() -> None:
    lens = Lens(build("llama"))
    vocab = lens.unembed(torch.zeros(1, lens.d_model)).shape[-1]
    one, other = random(2, 3, lens.d_model, seed=3).unbind()
    assert not torch.equal(lens.unembed(one).argmax(-1), lens.unembed(other).argmax(-1))
    assert convergence_layers(lens, [one, one, one]).tolist() == [0, 0, 0]
    differs = lens.unembed(one).argmax(-1) != lens.unembed(other).argmax(-1)
    settled = convergence_layers(lens, [one, other, one, one])
    assert settled.tolist() == [2 if each else 0 for each in differs.tolist()]
    assert vocab > 1


def test_weights_of_a_packed_layer_and_of_a_copy() -> None:
    before, after = Lens(build("llama")), Lens(build("llama"))
    block = after.model.model.layers[1].mlp
    original = block.up_proj.weight.detach().clone()
    quant = PerLayerQuant.quantize(original.numpy(), "up", rule="absmean")
    block.up_proj = TernaryLinear.from_quant(quant)
    with torch.no_grad():
        after.model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    assert matrix_shapes(after.model) == matrix_shapes(before.model)
    rows, notes = weight_rows(before, after)
    assert notes == []
    assert {(row.layer, row.module) for row in rows} == {
        (0, "self_attn.q_proj.weight"),
        (1, "mlp.up_proj.weight"),
    }
    (error,) = [row for row in rows if row.metric == "weight_relative_error" and row.layer == 1]
    gap = original - quant.reconstruct()
    expected = gap.double().square().sum() / original.double().square().sum()
    assert error.after == pytest.approx(float(expected), rel=1e-6)
    (zeros,) = [row for row in rows if row.metric == "weight_sparsity" and row.layer == 1]
    assert (zeros.before, zeros.after) == (0, pytest.approx(quant.sparsity))


def test_conditions_read_columns_and_signs() -> None:
    rows = [
        Row(None, "output", None, "perplexity", 10.0, 12.0, 2.0),
        Row(0, "attention", 0, "js_nats", 0.0, 0.1, 0.1),
        Row(0, "attention", 1, "js_nats", 0.0, math.nan, math.nan),
    ]
    for text, met in (
        ("perplexity>11", 1),
        ("perplexity.before > 11", 0),
        ("perplexity.ratio>=1.2", 1),
        ("perplexity.delta<=1.9", 0),
        ("js_nats<0.2", 2),
        ("js_nats>2e-1", 1),
    ):
        assert len(parse_condition(text).met_by(rows)) == met, text
    with pytest.raises(NotStoredError, match="kl_nats_mean"):
        parse_condition("kl_nats_mean>0").met_by(rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kl_nats_mean", "can't be read"),
        ("kl_nats_mean=0.1", "can't be read"),
        ("kl>0.1", "names no metric"),
        ("perplexity.rise>1", "names no column"),
        ("perplexity>a lot", "can't be read"),
        ("perplexity>high", "no number"),
        ("perplexity>nan", "no number"),
    ],
)
def test_a_condition_that_says_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_condition(text)


def test_every_metric_is_explained() -> None:
    assert all(words and words == words.strip() for words in METRICS.values())


def test_head_scores_come_with_their_spread_over_sequences() -> None:
    from_sequences, ids = RoleAccumulator(), torch.tensor([0, 1, 2, 3, 4, 1, 2, 3, 4])
    for seed in range(4):
        weights = torch.rand(1, 2, 9, 9, generator=torch.Generator().manual_seed(seed))
        from_sequences.add(0, "attention", ids, DensePattern(weights), DensePattern(weights / 2))
    rows = from_sequences.rows()
    for row in rows:
        if row.metric.endswith("_sd"):
            assert 0 < row.after < row.before
            assert row.after == pytest.approx(row.before / 2, rel=1e-4)
    assert {row.metric for row in rows} == {
        f"{role}_score{suffix}" for role in ROLES for suffix in ("", "_sd")
    }
