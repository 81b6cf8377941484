"""Effects of edits and their sweeps, against hooks and single runs; what an interrupt leaves."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trilens
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.analysis.edit_effects import edit_effect
from trilens.analysis.effect_sweeps import ablation_sweep, dose_response, knockout_sweep
from trilens.edits import Ablate, Knockout, Scale, Steer
from trilens.errors import EditError, MetricError, SiteError, TokenIdError, UsageError
from trilens.lens.lens import Lens
from trilens.progress import Step
from trilens.statistics.divergence import kl_nats

DEMOS = ("transformer", "mamba", "rwkv7")
# Rows of a batch are added up in another order than a single prompt.
BATCH = 1e-5


def metric(logits: Tensor) -> Tensor:
    return logits[-1, 20] - logits[-1, 30]


@pytest.fixture(scope="module", params=DEMOS)
def demo(request: pytest.FixtureRequest) -> Lens:
    return Lens.from_pretrained(trilens.demo_path(request.param), dtype="float32")


@pytest.fixture(scope="module")
def transformer() -> Lens:
    return Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")


IDS = torch.tensor([5, 90, 33, 12, 90, 33, 7])
OTHER = torch.tensor([8, 3, 44, 61])


def mixing(lens: Lens) -> str:
    return "attn.out" if lens.attention_layers else "mixer.out"


def hooked(lens: Lens, ids: Tensor, layer: int, change: Any, *, after_block: bool = False) -> float:
    """The metric with a plain hook on a block, or on the module of its attention or mixer."""
    site = lens.sites.sites["resid_post" if after_block else mixing(lens), layer]
    module = lens.anatomy.blocks[layer].module if after_block else site.tap.module

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (change(out[0]), *out[1:])
        return change(out)

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return float(metric(lens.model(input_ids=ids[None], use_cache=False).logits[0]))
    finally:
        handle.remove()


def test_zero_ablations_of_layers_are_what_hooks_give(demo: Lens) -> None:
    found = ablation_sweep(
        demo, [IDS, OTHER], metric, site=mixing(demo), by="layer", method="zero", batch_size=3
    )
    wanted = [
        np.mean([hooked(demo, ids, layer, torch.zeros_like) for ids in (IDS, OTHER)])
        for layer in found.layers
    ]
    assert found.layers == tuple(range(demo.n_layers))
    assert found.n_prompts == 2 and found.complete
    assert_near(found.values[:, 0], wanted, BATCH, least=1.0)
    assert np.abs(found.effects).max() > 0.01


def test_steering_by_dose_is_what_hooks_give(demo: Lens) -> None:
    vector = torch.randn(demo.d_model, generator=torch.Generator().manual_seed(0))
    found = dose_response(demo, IDS, vector, metric, scales=[0.0, 3.0, -1.5], batch_size=5)
    assert found.columns == (-1.5, 0.0, 3.0)
    for i, layer in enumerate(found.layers):
        for j, scale in enumerate(found.columns):
            wanted = hooked(demo, IDS, layer, lambda x, s=scale: x + s * vector, after_block=True)
            assert abs(found.values[i, j] - wanted) <= BATCH * max(1.0, abs(wanted))
    assert_near(found.values[:, 1], np.full(len(found.layers), found.base), BATCH, least=1.0)


def test_one_run_with_an_edit_is_what_a_hook_gives(demo: Lens) -> None:
    name = mixing(demo)
    found = edit_effect(demo, IDS, Ablate(name, layers=1), target=20, against=30, k=3)
    wanted = hooked(demo, IDS, 1, torch.zeros_like)
    plain = demo.capture(IDS, residual=None).logits
    edited = demo.capture(IDS, residual=None, edits=Ablate(name, layers=1)).logits
    assert plain is not None and edited is not None
    assert found.after == pytest.approx(wanted, abs=1e-6 * float(plain.abs().max()))
    assert found.before == pytest.approx(float(metric(plain)), abs=1e-6)
    np.testing.assert_array_equal(found.kl_nats, kl_nats(plain, edited))
    shift = (edited[-1].softmax(-1) - plain[-1].softmax(-1)).abs()
    assert [each.token_id for each in found.moved] == shift.topk(3).indices.tolist()
    assert found.moved[0].token == demo.capture([found.moved[0].token_id]).tokens[0]
    assert found.edits == (f"ablate:{name}@1",)
    assert json.loads(json.dumps(found.to_dict()))["positions"] == found.table()


def test_an_edit_that_changes_nothing_has_no_effect(transformer: Lens) -> None:
    found = edit_effect(transformer, IDS, Scale("resid_post", 1.0, layers=0), target=1, against=2)
    assert found.kl_nats.max() == 0
    assert found.before == found.after


def test_ablated_heads_in_batches_are_what_single_runs_give(transformer: Lens) -> None:
    reference = transformer.capture(OTHER, residual=None, sites=["attn.z"])
    steps: list[Step] = []
    found = ablation_sweep(
        transformer, [IDS], metric, layers=[1, 3], reference=reference, batch_size=5,
        progress=steps.append,
    )  # fmt: skip
    assert found.values.shape == (2, 8)
    assert [step.done for step in steps] == [5, 10, 15, 16] and steps[-1].total == 16
    for row, layer in enumerate((1, 3)):
        for head in (0, 5, 7):
            edit = Ablate("attn.z", layers=layer, heads=head, method="mean", reference=reference)
            logits = transformer.capture(IDS, residual=None, edits=edit).logits
            assert logits is not None
            wanted = float(metric(logits))
            assert abs(found.values[row, head] - wanted) <= BATCH * max(1.0, abs(wanted))
    assert found.best(1)[0]["effect"] == found.effects.flat[np.abs(found.effects).argmax()]


def test_the_mean_is_over_all_tokens_of_the_prompts(transformer: Lens) -> None:
    prompts = [IDS, OTHER]
    references = [transformer.capture(each, residual=None, sites=["attn.z"]) for each in prompts]
    own = ablation_sweep(transformer, prompts, metric, layers=[2])
    given = ablation_sweep(transformer, prompts, metric, layers=[2], reference=references)
    assert_near(own.values, given.values, 1e-6, least=1.0)


@pytest.mark.parametrize("by", ["head", "layer"])
def test_knockouts_in_batches_are_what_single_runs_give(transformer: Lens, by: Any) -> None:
    found = knockout_sweep(transformer, IDS, metric, queries=-1, keys=[1, 4], by=by, batch_size=7)
    heads: Any = range(8) if by == "head" else [None]
    assert found.values.shape == (4, len(heads))
    for layer in (0, 2):
        for column, head in enumerate(heads):
            edit = Knockout(layers=layer, heads=head, queries=-1, keys=[1, 4])
            logits = transformer.capture(IDS, residual=None, edits=edit).logits
            assert logits is not None
            wanted = float(metric(logits))
            assert abs(found.values[layer, column] - wanted) <= BATCH * max(1.0, abs(wanted))
    assert np.abs(found.effects).max() > 1e-3


def test_what_a_token_writes_is_knocked_out_of_each_layer(demo: Lens) -> None:
    found = knockout_sweep(demo, IDS, metric, keys=2, by="layer")
    assert found.layers == tuple(range(demo.n_layers))
    for layer in found.layers:
        logits = demo.capture(IDS, residual=None, edits=Knockout(layers=layer, keys=2)).logits
        assert logits is not None
        wanted = float(metric(logits))
        assert abs(found.values[layer, 0] - wanted) <= BATCH * max(1.0, abs(wanted))


def interrupting(after: int) -> Any:
    def progress(step: Step) -> None:
        if step.done >= after:
            raise KeyboardInterrupt

    return progress


def test_an_interrupt_leaves_what_was_run(transformer: Lens) -> None:
    whole = ablation_sweep(transformer, [IDS], metric, batch_size=8)
    found = ablation_sweep(transformer, [IDS], metric, batch_size=8, progress=interrupting(16))
    assert not found.complete
    assert_near(found.values[:2], whole.values[:2], BATCH, least=1.0)
    assert np.isnan(found.values[2:]).all()
    assert found.to_dict()["points"][-1]["value"] is None
    assert all(not math.isnan(row["effect"]) for row in found.best(100))
    two = ablation_sweep(
        transformer, [IDS, OTHER], metric, batch_size=8, reference=None, method="zero",
        progress=interrupting(40),
    )  # fmt: skip
    one = ablation_sweep(transformer, [IDS], metric, batch_size=8, method="zero")
    assert (two.n_prompts, two.complete, two.base) == (1, False, one.base)
    assert_near(two.values, one.values, BATCH, least=1.0)


def test_another_request_to_end_is_passed_on(transformer: Lens) -> None:
    class Stopped(KeyboardInterrupt):
        pass

    def progress(_step: Step) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        ablation_sweep(transformer, [IDS], metric, progress=progress)


VECTOR = torch.ones(256)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: ablation_sweep(s, [IDS], metric, site="attn.zz"), UsageError, "attn.z"),
        (lambda s: ablation_sweep(s, [IDS], metric, site="mixer.out"), SiteError, "no recurrent"),
        (lambda s: ablation_sweep(s, [IDS], metric, site="embed"), SiteError, "once"),
        (lambda s: ablation_sweep(s, [IDS], metric, site="mlp.out"), SiteError, "no heads"),
        (lambda s: ablation_sweep(s, [], metric), UsageError, "empty"),
        (lambda s: ablation_sweep(s, "text", metric), UsageError, "list of prompts"),
        (lambda s: ablation_sweep(s, [IDS], metric, layers=[9]), UsageError, "layer 9"),
        (lambda s: ablation_sweep(s, [IDS], metric, layers=[]), UsageError, "layers is empty"),
        (lambda s: ablation_sweep(s, [IDS], metric, by="token"), UsageError, "token"),
        (lambda s: ablation_sweep(s, [IDS], metric, method="resample"), UsageError, "resample"),
        (lambda s: ablation_sweep(s, [IDS], metric, batch_size=0), UsageError, "batch_size"),
        (lambda s: ablation_sweep(s, [IDS], lambda x: x), MetricError, "one floating-point"),
        (lambda s: knockout_sweep(s, IDS, metric), EditError, "queries or keys"),
        (lambda s: knockout_sweep(s, IDS, metric, keys=40), EditError, "position 40"),
        (lambda s: knockout_sweep(s, IDS, metric, keys=1, by="edge"), UsageError, "edge"),
        (lambda s: dose_response(s, IDS, VECTOR, metric, scales=[]), UsageError, "empty"),
        (lambda s: dose_response(s, IDS, VECTOR, metric, scales=[1, 1]), UsageError, "distinct"),
        (lambda s: dose_response(s, IDS, VECTOR[:9], metric, scales=[1]), EditError, "shape"),
        (lambda s: dose_response(s, IDS, VECTOR, metric, scales=[math.nan]), EditError, "scale"),
        (lambda s: edit_effect(s, IDS, []), UsageError, "empty"),
        (lambda s: edit_effect(s, IDS, Scale("embed", 2), target=1), UsageError, "together"),
        (
            lambda s: edit_effect(s, IDS, Scale("embed", 2), target=1, against=10**7),
            TokenIdError,
            "10000000",
        ),
        (lambda s: edit_effect(s, IDS, Scale("embed", 2), position=70), UsageError, "70"),
    ],
)
def test_bad_input_is_refused_by_name(
    transformer: Lens, call: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(transformer)


def test_a_reference_of_another_model_is_refused(transformer: Lens) -> None:
    other = Lens(build("llama")).capture(prompt_ids("llama", 5), residual=None, sites=["attn.z"])
    with pytest.raises(EditError, match="another model"):
        ablation_sweep(transformer, [IDS], metric, reference=other)


def test_a_vector_of_each_head_steers_heads(transformer: Lens) -> None:
    vector = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    found = dose_response(
        transformer, IDS, vector, metric, scales=[2], site="attn.z", layers=[1], positions="last"
    )
    edit = Steer("attn.z", layers=1, vector=vector, scale=2, positions="last")
    logits = transformer.capture(IDS, residual=None, edits=edit).logits
    assert logits is not None
    assert_near(found.values, [[float(metric(logits))]], BATCH, least=1.0)
