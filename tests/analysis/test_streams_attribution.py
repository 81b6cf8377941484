"""Direct attribution of several residual streams, against readouts and weights written by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tinymodels import build, prompt_ids, tiny_config
from tolerances import assert_near
from trilens import Capture, Lens, demo_path
from trilens.analysis.direct_attribution import Attribution, By, attribute, attribution_sites
from trilens.caches.gates import GateCache
from trilens.cli.main import app
from trilens.errors import CaptureError, NotStoredError, ShapeError
from trilens.taps import held_readout as held

TARGET, AGAINST = 17, 29
SHARED = "hy_v4"  # streams are passed on as they are
TYPES = ("deepseek_v4", SHARED, "qwen4_exp_text", "gemma3n_text")
EPS = 2e-5  # float32 through a whole model, of the largest value


@pytest.fixture(scope="module", params=TYPES)
def opened(request: pytest.FixtureRequest) -> Lens:
    return Lens(build(request.param))


@pytest.fixture(scope="module")
def hyper() -> Lens:
    return Lens(build(SHARED))


def ran(lens: Lens, by: By = "component", **how: Any) -> Capture:
    ids = prompt_ids(lens.model.config.model_type, 18, seed=3)[0]
    return lens.capture(ids, sites=attribution_sites(lens, by), gates=True, **how)


def value(found: Attribution, component: str, layer: int) -> float:
    return next(p.value for p in found.parts if (p.component, p.layer) == (component, layer))


def test_the_parts_sum_to_the_logit_difference(opened: Lens) -> None:
    whole = ran(opened, residual="all")
    for cap, position in ((ran(opened), -1), (whole, -1), (whole, 5)):
        found = attribute(cap, opened, TARGET, AGAINST, position=position)
        assert cap.logits is not None
        logits = cap.logits[position].double()
        bound = opened.anatomy.logit_softcap
        if bound:
            logits = bound * torch.atanh(logits / bound)
        assert abs(found.total - float(logits[TARGET] - logits[AGAINST])) <= 1e-4
        assert math.fsum(part.value for part in found.parts) == found.total
        rounding = next(p.value for p in found.parts if p.component == "rounding")
        assert abs(rounding) <= 1e-4
        assert any("held at what the pass used" in note for note in found.notes)
    every = {p.layer for p in found.parts if p.component == "mlp.add"}
    assert every == set(range(opened.n_layers))


@pytest.mark.parametrize("by", ["head", "neuron"])
def test_heads_and_neurons_sum_to_their_part(opened: Lens, by: By) -> None:
    fine = {"head": "attn.head_out", "neuron": "mlp.post"}[by]
    if not opened.site_layers.get(fine):
        with pytest.raises(CaptureError, match="use by='component'"):
            attribute(ran(opened, by), opened, TARGET, by=by)
        return
    cap = ran(opened, by)
    whole = attribute(cap, opened, TARGET, AGAINST)
    found = attribute(cap, opened, TARGET, AGAINST, by=by, k=3)
    assert found.total == pytest.approx(whole.total, abs=1e-9)
    kind = {"head": "attn", "neuron": "mlp"}[by]
    for layer in opened.site_layers[fine]:
        own = [p for p in found.parts if p.layer == layer and p.component.startswith(kind)]
        assert len(own) > 2
        assert math.fsum(p.value for p in own) == pytest.approx(
            value(whole, f"{kind}.add", layer), abs=1e-9
        )
        if by == "head":
            rest = next(p.value for p in own if p.component == "attn.rest")
            assert abs(rest) <= EPS * max(1.0, *(abs(p.value) for p in own))


def logit_direction(lens: Lens, x: Tensor) -> Tensor:
    """Final RMS norm at its scale for `x`, and unembedding."""
    norm = lens.model.get_submodule("model.norm")
    rows = lens.model.get_output_embeddings().weight.detach().double()
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
    scale = (x.square().mean() + eps).rsqrt()
    direction: Tensor = (rows[TARGET] - rows[AGAINST]) * norm.weight.detach().double() * scale
    return direction


def test_every_part_of_hyper_connections_by_hand(hyper: Lens) -> None:
    """Without a mix a part's share is its write weights times the last block's read weights."""
    cap = ran(hyper)
    found = attribute(cap, hyper, TARGET, AGAINST)
    streams = cap.residual[hyper.n_layers - 1].double()  # [streams, d_model]
    head = hyper.model.model.hc_head
    flat = streams.flatten()
    mixes = head.hc_fn.detach().double() @ flat
    mixes = mixes * (flat.square().mean() + head.input_norm.eps).rsqrt()
    read = torch.sigmoid(mixes * head.hc_scale.double() + head.hc_base.double()) + head.eps
    read = read.detach()
    direction = logit_direction(hyper, read @ streams)
    for layer in range(hyper.n_layers):
        writes = cap.gates["stream.write", layer][-1].double().reshape(2, -1)
        for part, kind in enumerate(("attn", "mlp")):
            given = cap.sites[f"{kind}.out", layer][-1].double()
            expected = float(writes[part] @ read) * float(given @ direction)
            assert_near(np.array(value(found, f"{kind}.add", layer)), expected, EPS, least=0.1)
    start = float(read @ cap.sites["resid_pre", 0][-1].double() @ direction)
    assert_near(np.array(found.parts[0].value), start, EPS, least=0.1)


def test_the_last_parts_of_altup_by_hand() -> None:
    """Streams are projected to the first one's magnitude, which is held, and averaged."""
    lens = Lens(build("gemma3n_text"))
    cap = ran(lens)
    found = attribute(cap, lens, TARGET, AGAINST)
    last = lens.n_layers - 1
    streams = cap.residual[last].double()
    size = streams[0].square().mean().sqrt()
    ways, means = [], []
    for i, stream in enumerate(streams):
        matrix = torch.eye(lens.d_model, dtype=torch.float64)
        if i:
            matrix = lens.model.model.altup_unembed_projections[i - 1].weight.detach().double()
        made = matrix @ stream
        factor = size / made.square().mean().sqrt()
        ways.append(factor * matrix / len(streams))
        means.append(factor * made / len(streams))
    direction = logit_direction(lens, torch.stack(means).sum(0))
    writes = cap.gates["stream.write", last][-1].double()
    for name in ("attn.add", "mlp.add"):
        given = cap.sites[name, last][-1].double()
        each = torch.stack([direction @ way @ given for way in ways])
        expected = float(each @ writes)
        assert_near(np.array(value(found, name, last)), expected, EPS, least=0.1)


def test_a_narrow_dtype_sums_within_its_rounding() -> None:
    lens = Lens(build(SHARED).bfloat16())
    cap = ran(lens)
    found = attribute(cap, lens, TARGET, AGAINST)
    assert cap.logits is not None
    size = float(cap.logits[-1].abs().max())
    assert abs(found.total - found.logit_difference) <= 4 * torch.finfo(torch.bfloat16).eps * size


def without(cap: Capture, gate: str) -> Capture:
    kept = [key for key in cap.gates if key[0] != gate]
    gates = GateCache.from_records(
        {key: cap.gates[key] for key in kept}, {key: cap.gates.spec(*key) for key in kept}
    )
    return replace(cap, parts=replace(cap.parts, gates=gates))


def test_weights_that_are_not_proven_are_refused_by_name() -> None:
    lens = Lens(build("deepseek_v4"))
    cap = ran(lens)
    with pytest.raises(NotStoredError, match="gates=True"):
        attribute(lens.capture(cap.token_ids, sites=attribution_sites(lens)), lens, TARGET)
    with pytest.raises(NotStoredError, match=r"resid_\w+ of layer 0"):
        attribute(lens.capture(cap.token_ids, sites=["resid_pre"], gates=True), lens, TARGET)
    with pytest.raises(CaptureError, match=r"layer 4 writes into .* \(no gate stream.write\)"):
        attribute(without(cap, "stream.write"), lens, TARGET)
    with pytest.raises(CaptureError, match="layer 4 passes its residual streams on by weights"):
        attribute(without(cap, "stream.mix"), lens, TARGET)


def test_a_readout_that_is_not_linear_is_refused(hyper: Lens) -> None:
    cap = ran(hyper)
    head = hyper.model.model.hc_head
    plain = head.forward
    head.forward = lambda x: plain(x) + x.sum(2).tanh()
    try:
        with pytest.raises(CaptureError, match="readout of 4 residual streams is not linear"):
            attribute(cap, hyper, TARGET)
    finally:
        head.forward = plain
    assert all(parameter.requires_grad for parameter in hyper.model.parameters())


def test_the_command_takes_them(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path("transformer"))
    config = tiny_config(SHARED)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = ["attribute", str(tmp_path), "-p", "x = 1", "--target", " =", "--format", "json"]
    ran = CliRunner().invoke(app, asked)
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert abs(found["total"] - found["logit_difference"]) <= 1e-4
    assert {"embed", "attn.add", "mlp.add"} <= {part["component"] for part in found["parts"]}


def test_another_position_than_the_one_read_out_is_refused(opened: Lens) -> None:
    cap = ran(opened)
    with pytest.raises(NotStoredError, match=r"at position 5 was not captured.*residual='all'"):
        attribute(cap, opened, TARGET, position=5)


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_readout_that_is_not_followed_is_refused(
    kept: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = Lens(build(SHARED).to(dtype))
    cap = ran(lens)
    real = held.run_readout

    def half_followed(*args: Any) -> Tensor:
        whole = real(*args)
        return whole.detach() if not kept else kept * whole + (1 - kept) * whole.detach()

    monkeypatch.setattr(held, "run_readout", half_followed)
    with pytest.raises(CaptureError, match="not linear in them"):
        attribute(cap, lens, TARGET)


def test_in_inference_mode_as_out_of_it(hyper: Lens) -> None:
    wanted = attribute(ran(hyper), hyper, TARGET, AGAINST)
    with torch.inference_mode():
        found = attribute(ran(hyper), hyper, TARGET, AGAINST)
    assert found.parts == wanted.parts


def test_streams_and_directions_of_another_shape(hyper: Lens) -> None:
    d_model = hyper.anatomy.d_model
    streams = torch.zeros(hyper.n_streams, d_model)
    with pytest.raises(ShapeError, match="are not"):
        hyper.fold_readout(streams[:-1], torch.zeros(d_model, dtype=torch.float64))
    with pytest.raises(ShapeError, match="are not"):
        hyper.fold_readout(streams, torch.zeros(d_model + 1, dtype=torch.float64))
    one = Lens(build("llama"))
    with pytest.raises(CaptureError, match="one residual stream"):
        one.fold_readout(torch.zeros(1, one.anatomy.d_model), torch.zeros(one.anatomy.d_model))
