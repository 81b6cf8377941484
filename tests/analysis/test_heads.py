"""Head scores against plain loops over dense weights in float64; known heads of the demo model."""

from __future__ import annotations

import json
import math

import pytest
import torch

import trilens
from lens_cases import demo_lens
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.analysis import head_scores, heads, repeated_tokens
from trilens.analysis.copying import _factor
from trilens.analysis.heads import ROLES, role_scores
from trilens.caches.patterns.protocol import DensePattern
from trilens.errors import (
    EmptyPromptError,
    IncomparableError,
    NotStoredError,
    UsageError,
    ValueRangeError,
)

SITES = ["attn.head_out", "attn.out", "attn.add"]
CLOSE = 1e-6  # weights are float32


def by_loops(weights: torch.Tensor, ids: list[int]) -> list[float]:
    """Of one head [seq, seq]: previous token, duplicate, induction, first position."""
    lines: list[list[float]] = [[], [], [], []]
    for q in range(len(ids)):
        row = weights[q].tolist()
        same = [k for k in range(q) if ids[k] == ids[q]]
        after = [k + 1 for k in same if k + 1 < q]
        for line, keys in zip(
            lines, ([q - 1] if q else [], same, after, [0] if q else []), strict=True
        ):
            if keys:
                line.append(math.fsum(row[k] for k in keys))
    return [math.fsum(line) / len(line) if line else math.nan for line in lines]


def random_pattern(ids: list[int], n_heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(ids))
    scores = torch.randn(1, n_heads, len(ids), len(ids), generator=generator)
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    "ids",
    [[5, 1, 2, 3, 1, 2, 3], [1, 1, 2, 1, 2, 2, 9], [4, 3, 2, 1], [7], [1, 2, 1, 2, 1, 2]],
    ids=["twice", "beside itself", "all different", "one", "three times"],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_roles_are_what_loops_give(
    ids: list[int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "BLOCK_BYTES", block)
    weights = random_pattern(ids)
    found = role_scores(DensePattern(weights), torch.tensor(ids))
    assert found.shape == (len(ROLES), 3)
    for head in range(3):
        expected = by_loops(weights[0, head].double(), ids)
        assert found[:4, head].tolist() == pytest.approx(expected, abs=CLOSE, nan_ok=True)
    assert_near(found[4], torch.zeros(3), CLOSE, least=1.0)


def test_the_sink_is_what_no_token_gets() -> None:
    ids = [1, 2, 3, 4]
    weights = random_pattern(ids) * 0.75
    assert_near(
        role_scores(DensePattern(weights), torch.tensor(ids))[4], torch.full((3,), 0.25), CLOSE
    )


def test_queries_of_the_last_tokens_alone() -> None:
    """As a decoding step has them: fewer queries than keys."""
    ids = [5, 1, 2, 3, 1, 2, 3]
    weights = random_pattern(ids)
    part = role_scores(DensePattern(weights[:, :, 4:]), torch.tensor(ids))
    rows = weights[0, 0].double()
    assert float(part[0, 0]) == pytest.approx(float(rows.diagonal(-1)[3:].mean()), abs=CLOSE)
    assert float(part[1, 0]) == pytest.approx(float(rows.diagonal(-3)[1:].mean()), abs=CLOSE)


def test_repeated_tokens() -> None:
    lens = demo_lens()
    ids = repeated_tokens(lens, 20, seed=3, repeats=3)
    first = lens.model.config.bos_token_id
    piece = ids[1:21]
    assert ids[0] == first and torch.equal(ids[1:], piece.repeat(3))
    assert len(set(piece.tolist())) == 20 and first not in piece.tolist()
    assert torch.equal(ids, repeated_tokens(lens, 20, seed=3, repeats=3))
    assert not torch.equal(ids[:21], repeated_tokens(lens, 20, seed=4))
    with pytest.raises(ValueRangeError, match="length 100000 is out of range"):
        repeated_tokens(lens, 100_000)
    with pytest.raises(ValueRangeError, match="length"):
        repeated_tokens(lens, 1)


def test_heads_that_the_demo_model_is_known_to_have() -> None:
    """docs/demo.md: a previous-token head and an induction head, which copies what it sees."""
    lens = demo_lens(dtype="float32")
    probes = [repeated_tokens(lens, 32, seed=seed) for seed in range(3)]
    found = head_scores(
        lens.capture_many(probes, attention=True, residual="all", sites=SITES), lens=lens
    )
    previous, induction = found.best("previous_token", 2), found.best("induction", 2)
    assert previous[0].score > 0.8 and previous[0].score > 1.5 * previous[1].score
    assert induction[0].score > 0.5
    copying = {(each.layer, each.head): each.score for each in found.best("copying", 99)}
    assert copying[induction[0].layer, induction[0].head] > 0.9
    assert found.n_captures == 3 and found.notes == () and found.layers == (0, 1, 2, 3)


def test_copying_is_what_taking_the_head_out_does() -> None:
    lens = demo_lens()
    cap = lens.capture(
        repeated_tokens(lens, 6), attention=True, residual="all", sites=SITES, layers=[1, 3]
    )
    ids = cap.token_ids.tolist()
    found = head_scores(cap, lens=lens)
    layer, head, tokens = 1, 3, sorted(set(ids))
    weights = cap.attention.pattern(layer).dense()[0, head].double()
    stream, out = cap.residual[3], cap.sites["attn.head_out", layer][:, head]
    effect = (lens.unembed(stream) - lens.unembed(stream - out))[:, tokens]
    total = score = 0.0
    for q in range(1, len(ids)):
        k = 1 + int(weights[q, 1 : q + 1].argmax())
        own = effect[q, tokens.index(ids[k])]
        share = float((effect[q] < own).sum()) / (len(tokens) - 1)
        score += float(weights[q, k]) * share
        total += float(weights[q, k])
    assert float(found.means[layer][5, head]) == pytest.approx(score / total, abs=1e-5)


def test_successors_are_asked_for_in_the_place_of_what_is_seen() -> None:
    lens = demo_lens()
    cap = lens.capture(repeated_tokens(lens, 6), attention=True, residual="all", sites=SITES)
    same = {token: token for token in cap.token_ids.tolist()}
    found = head_scores(cap, lens=lens, successors=same)
    assert found.roles[-2:] == ("copying", "successor")
    for scores in found.means.values():
        assert torch.equal(scores[-1], scores[-2])
    nothing = head_scores(cap, lens=lens, successors={1999: 5})
    assert all(row["successor"] is None for row in nothing.table())
    moved = dict(zip(same, [*list(same)[1:], 0], strict=True))
    assert not torch.equal(
        head_scores(cap, lens=lens, successors=moved).means[2][-1], found.means[2][-1]
    )


@pytest.mark.parametrize("kind", ["gpt2", "cohere", "granite"])
def test_copying_of_parallel_blocks_factors_and_other_projections(kind: str) -> None:
    lens = trilens.Lens(build(kind))
    cap = lens.capture(prompt_ids(kind), attention=True, residual="all", sites=SITES)
    found = head_scores(cap, lens=lens)
    assert found.notes == ()
    scores = torch.cat([means[5] for means in found.means.values()])
    assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_heads_go_through_a_norm_behind_attention_as_it_stands(kind: str) -> None:
    lens = trilens.Lens(build(kind, dtype=torch.float64))
    cap = lens.capture(prompt_ids(kind), attention=True, residual="all", sites=SITES)
    layer, head, last = 0, 1, lens.n_layers - 1
    found = head_scores(cap, lens=lens)
    assert found.notes == ()
    # The model's own norm: by its epsilon alone, what each token is divided by can't be told.
    out, add = cap.sites["attn.out", layer], cap.sites["attn.add", layer]
    scale = out.square().mean(-1, keepdim=True).add(lens.model.config.rms_norm_eps).rsqrt()
    weights = (add / (out * scale)).median(0).values
    assert torch.allclose(out * scale * weights, add)
    part = cap.sites["attn.head_out", layer][:, head] * scale * weights
    ids = cap.token_ids.tolist()
    tokens = sorted(set(ids))
    stream, pattern = cap.residual[last], cap.attention.pattern(layer).dense()[0, head].double()
    effect = (lens.unembed(stream) - lens.unembed(stream - part))[:, tokens]
    total = score = 0.0
    for q in range(1, len(ids)):
        k = 1 + int(pattern[q, 1 : q + 1].argmax())
        own = effect[q, tokens.index(ids[k])]
        less = (effect[q] < own).sum() + 0.5 * ((effect[q] == own).sum() - 1)
        score += float(pattern[q, k] * less) / (len(tokens) - 1)
        total += float(pattern[q, k])
    assert float(found.means[layer][5, head]) == pytest.approx(score / total, abs=1e-3)


def test_what_no_factors_are_is_refused() -> None:
    out = torch.randn(9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert _factor(out, torch.nn.functional.layer_norm(out, (16,))) is None
    assert _factor(out[:1], torch.nn.functional.rms_norm(out[:1], (16,)) * out[1]) is None
    assert _factor(out, -3 * out) is not None
    normed = torch.nn.functional.rms_norm(out, (16,)) * out[1]
    factor = _factor(out, normed)
    assert factor is not None and torch.allclose(factor * out, normed)


def test_recurrent_layers_are_scored_without_signs() -> None:
    lens = demo_lens("rwkv7", "float32")
    cap = lens.capture(repeated_tokens(lens, 12), effective=True)
    found = head_scores(cap)
    view = cap.effective.relu_l1().pattern(1)
    expected = by_loops(view.rows(range(view.seq_q), 2)[0].double(), cap.token_ids.tolist())
    assert found.means[1][:4, 2].tolist() == pytest.approx(expected, abs=1e-5)


def test_as_rows_and_json() -> None:
    lens = demo_lens()
    found = head_scores(lens.capture([5, 6, 7], attention=True))
    assert found.table()[0]["induction"] is None
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(plain["rows"]) == len(found.to_pandas()) == 4 * 8
    assert plain["rows"][0]["sd"]["previous_token"] == 0.0
    assert found.best("induction") == ()


def test_what_is_refused() -> None:
    lens = demo_lens()
    ids = repeated_tokens(lens, 6)
    with pytest.raises(NotStoredError, match="capture with attention=True"):
        head_scores(lens.capture(ids))
    with pytest.raises(EmptyPromptError, match="captures are empty"):
        head_scores([])
    cap = lens.capture(ids, attention=True)
    with pytest.raises(UsageError, match="give lens="):
        head_scores(cap, successors={1: 2})
    with pytest.raises(NotStoredError, match="residual='all'"):
        head_scores(cap, lens=lens)
    with pytest.raises(NotStoredError, match="sites"):
        head_scores(lens.capture(ids, attention=True, residual="all"), lens=lens)
    with pytest.raises(IncomparableError, match="several models, or of other layers"):
        head_scores([cap, lens.capture(ids, attention=True, layers=[1])])
    with pytest.raises(UsageError, match="role 'boss' is not here: the roles are previous_token"):
        head_scores(cap).best("boss")
    with pytest.raises(IncomparableError, match="capture is of LlamaForCausalLM"):
        head_scores(cap, lens=demo_lens("mamba"))
