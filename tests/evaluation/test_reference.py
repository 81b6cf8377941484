from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sensitivity_cases import blocks, opened
from tolerances import largest, sum_error
from trilens.errors import EmptyPromptError, NonFiniteError, TooLargeError
from trilens.evaluation import reference as damage
from trilens.evaluation.reference import Degradation, ReferenceLogits
from trilens.lens.lens import Lens
from trilens.statistics.divergence import kl_nats
from trilens.taps.parameters import swapped


@pytest.fixture(scope="module")
def lens(tmp_path_factory: pytest.TempPathFactory) -> Lens:
    return opened("llama", tmp_path_factory.mktemp("llama"))


def _logits(lens: Lens, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lens.model(ids[None]).logits[0, :-1].double()


def test_an_unchanged_model_has_exactly_no_damage(lens: Lens) -> None:
    assert ReferenceLogits(lens, blocks("llama")).measure() == Degradation(0.0, 0.0, 3 * 23, 24)


def test_it_is_the_mean_over_predicted_tokens(lens: Lens) -> None:
    ids = [*blocks("llama"), blocks("llama", 1, 7)[0]]
    name = "model.layers.0.self_attn.q_proj.weight"
    before = [_logits(lens, block) for block in ids]
    reference = ReferenceLogits(lens, ids)
    with swapped(lens.model, {name: lens.model.get_parameter(name).detach() * 3}):
        found = reference.measure()
        after = [_logits(lens, block) for block in ids]
    kl = [kl_nats(b, a) for b, a in zip(before, after, strict=True)]
    n_tokens = sum(len(values) for values in kl)

    def nll(logits: list[torch.Tensor]) -> float:
        pairs = zip(logits, ids, strict=True)
        return sum(
            float(torch.nn.functional.cross_entropy(rows, block[1:], reduction="sum"))
            for rows, block in pairs
        )

    assert found.n_tokens == reference.n_tokens == n_tokens
    # Float32 log-softmaxes: each a sum over the vocabulary, of 1, and logits of some nats.
    top = max(largest(rows) for rows in (*before, *after))
    nats = float(sum_error(before[0].shape[1], 2, torch.float32))
    nats += float(sum_error(4, top, torch.float32))
    assert found.kl_nats == pytest.approx(sum(v.sum() for v in kl) / n_tokens, abs=nats)
    assert found.kl_nats > 20 * nats
    assert found.nll_nats == pytest.approx((nll(after) - nll(before)) / n_tokens, abs=nats)
    assert found.perplexity_ratio == pytest.approx(math.exp(found.nll_nats))
    assert reference.nll_nats == pytest.approx(nll(before) / n_tokens, abs=nats)


def test_another_model_is_measured_by_the_same_yardstick(lens: Lens, tmp_path: Path) -> None:
    reference = ReferenceLogits(lens, blocks("llama"))
    other = opened("llama", tmp_path)
    assert reference.measure(other) == Degradation(0.0, 0.0, 3 * 23, 24)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = {name: other.model.get_parameter(name).detach() * 3}
    with swapped(other.model, weights):
        assert reference.measure() == Degradation(0.0, 0.0, 3 * 23, 24)
        found = reference.measure(other)
    with swapped(lens.model, weights):
        assert reference.measure() == found
    assert found.kl_nats > 0


def test_a_model_that_breaks_down_has_infinite_damage(lens: Lens) -> None:
    reference = ReferenceLogits(lens, blocks("llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    broken = torch.full_like(lens.model.get_parameter(name), torch.nan)
    with swapped(lens.model, {name: broken}):
        found = reference.measure()
        with pytest.raises(NonFiniteError, match="own logits hold NaN"):
            ReferenceLogits(lens, blocks("llama"))
    assert (found.nll_nats, found.kl_nats) == (math.inf, math.inf)
    assert found.perplexity_ratio == math.inf


def test_no_token_to_predict(lens: Lens) -> None:
    with pytest.raises(EmptyPromptError, match="no token to predict"):
        ReferenceLogits(lens, [torch.tensor([5])])


def test_logits_that_do_not_fit_are_refused(
    lens: Lens, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(damage, "_MAX_BYTES", 1000)
    with pytest.raises(TooLargeError, match="take fewer tokens"):
        ReferenceLogits(lens, blocks("llama"))
