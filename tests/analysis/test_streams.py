"""What analyses and checkpoints make of several residual streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_cases import load, saved
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.analysis.comparison.run import compare
from trilens.analysis.heads import head_scores
from trilens.analysis.inspection import inspect_capture
from trilens.analysis.lenses.tuned_lens import tuned_lens
from trilens.analysis.path_patching import path_patch
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.errors import IncomparableError
from trilens.lens.lens import Lens

TYPE = "hy_v4"


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens(build(TYPE))


def ids_of(length: int, seed: int = 3) -> list[int]:
    return prompt_ids(TYPE, length, seed=seed)[0].tolist()


def test_compare_takes_the_streams_of_a_token_as_one_vector(lens: Lens) -> None:
    other = Lens(build(TYPE))
    with torch.no_grad():
        other.model.model.layers[1].mlp.gate.weight.mul_(-1.0)
    prompts = [ids_of(18), ids_of(9, 4)]
    same = compare(lens, Lens(build(TYPE)), prompts)
    assert all(row.delta in (0.0, None) for row in same.rows)
    changed = compare(lens, other, prompts)
    row = {(each.module, each.layer, each.metric): each for each in changed.rows}
    errors = []
    for prompt in prompts:
        a, b = (each.capture(prompt, residual="all").residual[1].double() for each in (lens, other))
        errors.append((a - b).flatten(1).square().sum(1) / a.flatten(1).square().sum(1))
    expected = float(torch.cat(errors).mean())
    assert expected > 0
    assert_near(row["resid_post", 1, "relative_error"].after, expected, 1e-6)
    assert any(key[0] == "logit_lens" for key in row)
    assert any(key[0] == "stream.write" for key in row)


def test_models_with_other_numbers_of_streams_do_not_compare(lens: Lens) -> None:
    config = build("deepseek_v4").config
    config.hc_mult = 2
    one, two = Lens(build("deepseek_v4")), Lens(type(build("deepseek_v4"))(config).eval())
    with pytest.raises(IncomparableError, match="4 residual streams before, 2 after"):
        compare(one, two, [ids_of(9)])


def test_a_tuned_lens_is_fitted_to_readouts(lens: Lens) -> None:
    captures = [lens.capture(ids_of(30, seed), residual="all") for seed in range(8)]
    tuned = tuned_lens(captures, ridge=1e-3)
    held = captures[0].residual
    for layer in tuned.layers:
        assert tuned.translate(layer, held.readout(layer)).shape == (30, lens.d_model)
    # Least squares on the tokens that it was fitted to.
    assert max(tuned.fitted_errors) < max(tuned.untranslated_errors)


def test_copying_scores_and_norms(lens: Lens) -> None:
    sites = ["attn.head_out", "attn.out"]
    cap = lens.capture(ids_of(18), residual="all", attention=True, gates=True, sites=sites)
    scores = head_scores(cap, lens=lens)
    assert any("4 residual streams" in note for note in scores.notes)
    row = inspect_capture(
        lens.capture(ids_of(12), gates=True), name="tiny", top_k=2, token_text=str
    ).layers[1]
    last = lens.capture(ids_of(12)).residual[1]
    assert_near(row.residual_norm, float(last.norm()), 1e-6)


def test_a_path_is_patched_through_the_streams(lens: Lens) -> None:
    clean, corrupted = ids_of(12), ids_of(12, 9)
    found = path_patch(
        lens,
        clean,
        corrupted,
        ("attn.z", 0, 1),
        [("resid_post", 3)],
        metric=lambda logits: logits[-1, 5],
    )
    assert found.moved[0] > 0


def test_ternarized_and_opened_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    saved(TYPE, source)
    ternarize(source, tmp_path / "out", plan=TernaryPlan("absmean"))
    before, after = Lens(load(source)), Lens(load(tmp_path / "out"))
    assert after.n_streams == before.n_streams == 4
    ids = ids_of(10)
    one, other = (each.capture(ids, residual="all").residual for each in (before, after))
    assert one[0].shape == other[0].shape
    assert not torch.equal(one[0], other[0])
