"""Gradients at sites against differences of edited runs; parameters frozen and given back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinymodels import build, prompt_ids
from trilens.edits import Custom, Scale
from trilens.errors import MetricError
from trilens.lens.lens import Lens

pytestmark = pytest.mark.usefixtures("quiet")

STEP = 1e-3
BY_QUERY = ("attn.scores", "attn.pattern")


def metric(logits: Tensor) -> Tensor:
    return logits[-1, 20] - logits[-1, 30]


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "mamba", "falcon_h1", "rwkv"]
)
def test_gradients_are_what_differences_of_runs_give(model_type: str) -> None:
    """In float64, along a random direction; norms of several families compute in float32."""
    lens, ids = Lens(build(model_type, dtype=torch.float64)), prompt_ids(model_type, 13)
    names = [n for n in lens.site_layers if n != "router"]
    found = lens.gradients(ids, metric, sites=names)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        layers = lens.site_layers[name]
        layer = layers[0] if layers else None
        value = found.values[name, layer]
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        # An edit sees a token's row of every head.
        by_token = direction.transpose(0, 1) if name in BY_QUERY else direction

        def moved(sign: float, name: str = name, layer: int | None = layer, d: Tensor = by_token):
            move = Custom(name, lambda x: x + sign * STEP * d.reshape(x.shape), layers=layer)
            return float(metric(lens.capture(ids, residual=None, edits=move).logits))

        difference = (moved(1) - moved(-1)) / (2 * STEP)
        gradient = found.gradients[name, layer]
        slope = float((gradient * direction).sum())
        # float32 norms round at 1e-7, over a step of 2e-3; the difference errs by its step squared.
        scale = float((gradient * direction).abs().sum())
        assert abs(slope - difference) <= 1e-3 * max(scale, 0.1), (name, slope, difference)


def test_a_metric_that_does_not_depend_on_a_site_has_no_gradient_there() -> None:
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)
    found = lens.gradients(ids, lambda logits: logits[2, 5], sites=["resid_post"])
    # A causal model's logits at position 2 depend on no later token.
    assert all(bool((found.gradients["resid_post", i][3:] == 0).all()) for i in range(2))
    assert bool((found.gradients["resid_post", 0][:3] != 0).any())


def test_edits_are_part_of_the_graph() -> None:
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)
    plain = lens.gradients(ids, metric, sites=["mlp.out"], layers=[1])
    half = lens.gradients(
        ids, metric, sites=["mlp.out"], layers=[1], edits=Scale("mlp.add", 0.0, layers=1)
    )
    assert bool((plain.gradients["mlp.out", 1] != 0).any())
    assert bool((half.gradients["mlp.out", 1] == 0).all())


def test_parameters_are_frozen_and_given_back() -> None:
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    lens, ids = Lens(model), prompt_ids("llama", 9)
    lens.gradients(ids, metric)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(MetricError):
        lens.gradients(ids, lambda logits: logits)
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda logits: logits[-1], "one floating-point number"),
        (lambda logits: 3.0, "float"),
        (lambda logits: logits.argmax(), "int64"),
        (lambda logits: logits.sum() * float("nan"), "nan"),
        (lambda logits: torch.ones(()), "does not depend"),
    ],
)
def test_a_metric_that_gives_no_scalar_is_refused(given, words: str) -> None:
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)
    with pytest.raises(MetricError, match=words):
        lens.gradients(ids, given)


def test_gradients_of_a_pattern_change_nothing_else() -> None:
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)
    names = ["resid_post", "attn.q_rot", "attn.v"]
    plain = lens.gradients(ids, metric, sites=names)
    beside = lens.gradients(ids, metric, sites=[*names, *BY_QUERY])
    assert beside.metric == plain.metric
    for name in names:
        for layer in range(lens.n_layers):
            one, other = beside.gradients[name, layer], plain.gradients[name, layer]
            torch.testing.assert_close(one, other)
    # What a query does not see has no gradient in its score, and one in its weight.
    score = beside.gradients["attn.scores", 0]
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert bool((score[:, hidden] == 0).all()) and bool(score.isfinite().all())
