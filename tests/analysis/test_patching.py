"""Patching sweeps against hand-written hooks; estimates against the sweep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trilens
from tinymodels import build, prompt_ids
from trilens.analysis.attribution_patching import attribution_patch, integrated_gradients
from trilens.analysis.patch_result import PatchSweep
from trilens.analysis.patching import patch_sweep
from trilens.errors import MetricError, SiteError, UsageError
from trilens.lens.lens import Lens
from trilens.statistics.ranks import rank_correlation

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def two() -> tuple[Tensor, Tensor]:
    clean = prompt_ids("llama", 9)[0]
    corrupted = clean.clone()
    corrupted[[2, 5]] = torch.tensor([41, 77])
    return clean, corrupted


def metric(logits: Tensor) -> Tensor:
    return logits[-1, 20] - logits[-1, 30]


def by_hand(lens: Lens, ids: Tensor, layer: int, position: int, value: Tensor) -> float:
    """The metric with one token's stream before a block replaced by a plain hook."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = None if args else "hidden_states"
        stream = (args[0] if args else kwargs[name]).clone()
        stream[:, position] = value
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, name: stream})

    module = lens.anatomy.blocks[layer].module
    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with torch.no_grad():
            return float(metric(lens.model(input_ids=ids[None], use_cache=False).logits[0]))
    finally:
        handle.remove()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_sweep_is_what_hooks_give(model_type: str, direction: Any, two: Any) -> None:
    lens = Lens(build(model_type))
    clean, corrupted = two
    found = patch_sweep(lens, clean, corrupted, metric, direction=direction, batch_size=4)
    receiver, donor = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    source = lens.capture(donor, sites=["resid_pre"]).sites
    assert found.values.shape == (lens.n_layers, 9)
    scale = max(1.0, abs(found.base), abs(found.target))
    for layer in range(lens.n_layers):
        for position in (2, 4, 8):
            value = source["resid_pre", layer][position]
            wanted = by_hand(lens, receiver, layer, position, value)
            # One token of a batch is added up in another order than the same one alone.
            assert abs(found.values[layer, position] - wanted) <= 1e-5 * scale
    # Tokens before the first that differs, and streams that equal, change nothing.
    assert np.abs(found.effects[:, :2]).max() <= 1e-4


def test_patching_the_whole_stream_at_the_last_token_of_the_last_layer_gives_the_other_run(
    two: Any,
) -> None:
    lens = Lens(build("llama"))
    last = lens.n_layers - 1
    found = patch_sweep(lens, *two, metric, site="resid_post", layers=[last], positions=[-1])
    assert found.places == (8,)
    assert abs(found.effects[0, 0] - 1) <= 1e-4


def test_heads_in_batches_and_one_by_one(two: Any) -> None:
    lens = Lens(build("llama"))
    options = {"site": "attn.z", "by": "head"}
    together = patch_sweep(lens, *two, metric, batch_size=8, **options)
    alone = patch_sweep(lens, *two, metric, batch_size=1, **options)
    assert together.values.shape == (lens.n_layers, lens.model.config.num_attention_heads)
    assert np.abs(together.values - alone.values).max() <= 1e-5
    assert {"layer", "head", "value", "effect"} == set(together.table()[0])


def test_prompts_of_different_lengths_are_aligned() -> None:
    lens = Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
    clean, corrupted = "def add(first, second):", "def add(one, second):"
    found = patch_sweep(lens, clean, corrupted, lambda logits: logits[-1, 40] - logits[-1, 50])
    assert len(found.tokens) == len(lens.capture(corrupted).tokens)
    whole = ~np.isnan(found.values).all(0)
    assert whole.sum() == len(lens.capture(corrupted).align(lens.capture(clean)).pairs)
    assert found.to_dict()["points"][0]["layer"] == 0


def test_an_interrupt_keeps_what_was_run(two: Any) -> None:
    lens = Lens(build("llama"))

    def stop(step: Any) -> None:
        if step.done >= 8:
            raise KeyboardInterrupt

    found = patch_sweep(lens, *two, metric, batch_size=4, progress=stop)
    assert not found.complete
    assert int((~np.isnan(found.values)).sum()) == 8
    assert found.to_dict()["points"][-1]["value"] is None


def test_estimates_by_gradients(two: Any) -> None:
    """The integral misses the exact effect of a layer by what sixteen midpoints miss."""
    lens = Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
    exact = patch_sweep(lens, *two, metric, site="mlp.out")
    steps = integrated_gradients(lens, *two, metric, site="mlp.out", steps=16)
    once = attribution_patch(lens, *two, metric, site="mlp.out")
    assert once.method == "gradient"
    assert steps.error is not None
    assert max(steps.error) <= 0.05 * abs(steps.target - steps.base)
    ranks = [rank_correlation(exact.values.ravel(), e.values.ravel()) for e in (once, steps)]
    assert all(rank is not None and rank > 0.5 for rank in ranks), ranks


def test_an_estimate_is_difference_times_gradient(two: Any) -> None:
    """To first order the effect is the difference of the runs times the gradient, by token."""
    lens = Lens(build("llama"))
    last = lens.n_layers - 1
    estimate = attribution_patch(lens, *two, metric, site="resid_post", layers=[last])
    found = lens.gradients(two[1], metric, layers=[last]).gradients["resid_post", last]
    clean, corrupted = (
        lens.capture(ids, sites=["resid_post"], layers=[last]).sites["resid_post", last]
        for ids in two
    )
    wanted = ((clean - corrupted).double() * found.double()).sum(-1).numpy()
    assert np.abs(estimate.values[0] - estimate.base - wanted).max() <= 1e-9


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"site": "resid_pst"}, UsageError, "resid_post"),
        ({"site": "embed"}, SiteError, "not swept"),
        ({"site": "resid_pre", "by": "head"}, SiteError, "no heads"),
        ({"by": "neuron"}, UsageError, "position"),
        ({"direction": "up"}, UsageError, "denoise"),
        ({"positions": [99]}, UsageError, "99"),
        ({"site": "attn.z", "by": "head", "positions": [1]}, UsageError, "as a whole"),
    ],
)
def test_bad_options(options: dict[str, Any], error: Any, words: str, two: Any) -> None:
    with pytest.raises(error, match=words):
        patch_sweep(Lens(build("llama")), *two, metric, **options)


def test_metrics_that_tell_nothing(two: Any) -> None:
    lens = Lens(build("llama"))
    with pytest.raises(MetricError, match="both runs"):
        patch_sweep(lens, two[0], two[0], metric)
    with pytest.raises(MetricError, match="one floating-point number"):
        patch_sweep(lens, *two, lambda logits: logits)
    assert isinstance(patch_sweep(lens, *two, metric, layers=[0], positions=[2]), PatchSweep)


def test_a_request_to_end_that_is_no_interrupt_is_passed_on(two: Any) -> None:
    """A signal's own exception ends the caller too; Ctrl-C alone leaves a partial result."""

    class Stopped(KeyboardInterrupt):
        pass

    def progress(_step: Any) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        patch_sweep(Lens(build("llama")), *two, metric, batch_size=4, progress=progress)
