"""The logit lens against the model's own modules in float64, hand-written."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import trilens.analysis.residual_logits as residual_logits
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens import Capture, Lens, demo_path
from trilens.analysis.logit_lens import logit_lens
from trilens.errors import (
    IncomparableError,
    NonFiniteError,
    NotStoredError,
    ShapeError,
    TokenIdError,
    ValueRangeError,
)

NORM = {"gpt2": "transformer.ln_f", "llama": "model.norm", "gemma2": "model.norm"}
NEAR = 2e-5  # float32 through a norm and an unembedding, of the largest value


def opened(kind: str, **how: Any) -> tuple[Lens, Capture]:
    lens = Lens(build(kind))
    return lens, lens.capture(prompt_ids(kind, 12)[0], **{"residual": "all", **how})


def by_hand(lens: Lens, kind: str, residual: torch.Tensor) -> Any:
    model = copy.deepcopy(lens.model).double()
    with torch.no_grad():
        values = model.get_output_embeddings()(model.get_submodule(NORM[kind])(residual.double()))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (values if cap is None else cap * (values / cap).tanh()).numpy()


@pytest.mark.parametrize("kind", list(NORM))
def test_every_number_by_hand(kind: str) -> None:
    lens, cap = opened(kind)
    found = logit_lens(cap, lens, k=3, target=17)
    assert found.target_rank is not None and found.target_probability is not None
    assert found.target_logit is not None
    rows = [by_hand(lens, kind, cap.residual[layer]) for layer in found.layers]
    shares = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in rows]
    for i, (logits, share) in enumerate(zip(rows, shares, strict=True)):
        p = np.exp(share)
        best = -np.sort(-p, axis=-1)[:, :3]
        assert_near(found.top_probabilities[i], best, NEAR)
        assert_near(np.take_along_axis(p, found.top_ids[i], -1), best, NEAR)
        assert_near(found.entropy_nats[i], -(p * share).sum(-1), NEAR)
        gap = (np.exp(shares[-1]) * (shares[-1] - share)).sum(-1)
        assert_near(found.kl_nats[i], gap, NEAR, least=1.0)
        assert_near(found.target_logit[i], logits[:, 17], NEAR, least=float(np.abs(logits).max()))
        assert_near(found.target_probability[i], p[:, 17], NEAR)
        sure = np.abs(np.delete(logits, 17, -1) - logits[:, 17:18]).min(-1) > 1e-4
        rank = (logits > logits[:, 17:18]).sum(-1)
        assert sure.any() and (found.target_rank[i] == rank)[sure].all()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neox", "mamba", "rwkv"])
def test_the_last_layer_is_the_model(kind: str) -> None:
    lens, cap = opened(kind)
    found = logit_lens(cap, lens, k=1, target=17)
    assert cap.logits is not None and found.target_logit is not None
    scale = float(cap.logits.abs().max())
    assert_near(found.target_logit[-1], cap.logits[:, 17], 1e-5, least=scale)
    assert not found.kl_nats[-1].any()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, cap = opened("llama")
    whole = logit_lens(cap, lens, target=17)
    monkeypatch.setattr(residual_logits, "CHUNK_ELEMENTS", 1)
    single = logit_lens(cap, lens, target=17)
    assert (whole.top_ids == single.top_ids).all()
    for name in ("top_probabilities", "entropy_nats", "kl_nats", "target_logit"):
        assert_near(getattr(single, name), getattr(whole, name), NEAR, least=1.0)


def test_some_positions_and_layers_and_the_last_token_alone() -> None:
    lens, cap = opened("llama")
    every = logit_lens(cap, lens)
    some = logit_lens(cap, lens, positions=[-1, 2], layers=[0])
    assert some.positions == (11, 2) and some.layers == (0,)
    assert_near(some.entropy_nats[0], every.entropy_nats[0][[11, 2]], NEAR)
    last = logit_lens(opened("llama", residual="last")[1], lens)
    assert last.positions == (11,)
    assert_near(last.kl_nats[:, 0], every.kl_nats[:, 11], NEAR, least=1.0)


def test_a_translator_reads_every_layer_but_the_last() -> None:
    lens, cap = opened("llama")
    final = cap.residual[lens.n_layers - 1]
    found = logit_lens(cap, lens, translator=lambda layer, residual: final)
    assert float(found.kl_nats.max()) < NEAR
    with pytest.raises(ShapeError):
        logit_lens(cap, lens, translator=lambda layer, residual: residual[:, :3])


def test_bad_input_is_named() -> None:
    lens, cap = opened("llama")
    with pytest.raises(NotStoredError, match="position 11 alone"):
        logit_lens(opened("llama", residual="last")[1], lens, positions=[0])
    with pytest.raises(NotStoredError, match="the last one"):
        logit_lens(opened("llama", layers=[0])[1], lens)
    with pytest.raises(NotStoredError, match="not all captured"):
        logit_lens(cap, lens, layers=[99])
    with pytest.raises(NotStoredError, match="residual"):
        logit_lens(opened("llama", residual=None)[1], lens)
    with pytest.raises(ValueRangeError, match="k 0"):
        logit_lens(cap, lens, k=0)
    with pytest.raises(TokenIdError):
        logit_lens(cap, lens, target=10**6)
    with pytest.raises(IncomparableError, match="GPT2LMHeadModel"):
        logit_lens(cap, Lens(build("gpt2")))
    with torch.no_grad():
        lens.model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="position 0"):
        logit_lens(cap, lens)


def test_the_table_of_a_demo() -> None:
    lens = Lens.from_pretrained(demo_path("transformer"))
    cap = lens.capture("def area(r):", residual="all")
    rows = logit_lens(cap, lens, k=2, target=" are").table()
    assert len(rows) == 4 * 6 and len({tuple(row) for row in rows}) == 1
    assert rows[0]["top_tokens"] == [lens.tokenizer.decode([i]) for i in rows[0]["top_ids"]]
    assert logit_lens(cap, lens, target=" are").to_dict()["target_token"] == " are"
