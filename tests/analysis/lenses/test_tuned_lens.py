"""The tuned lens against least squares of stacked rows; what it explains, saves and refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import trilens
from lens_cases import demo_lens
from tinymodels import build
from tolerances import assert_near
from trilens.analysis import TunedLens, logit_lens, tuned_lens
from trilens.errors import (
    AbsentLayerError,
    CorruptFileError,
    IncomparableError,
    NonFiniteError,
    NotStoredError,
    TextError,
    UsageError,
    ValueRangeError,
)

CLOSE = 2e-6  # the maps are kept in float32
RIDGE = 1e-3


def tiny() -> tuple[trilens.Lens, list[trilens.Capture]]:
    lens = trilens.Lens(build("llama", dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 90, (40,), generator=generator).tolist() for _ in range(11)]
    return lens, list(lens.capture_many(prompts, residual="all", logits=None))


def rows(caps: list[trilens.Capture], layer: int, skip: int = 0) -> torch.Tensor:
    return torch.cat([cap.residual[layer][skip:] for cap in caps])


@pytest.mark.parametrize("skip", [0, 3])
def test_maps_are_those_of_stacked_rows(skip: int) -> None:
    lens, caps = tiny()
    found = tuned_lens(iter(caps), ridge=RIDGE, held_out_every=4, skip=skip)
    out = [cap for i, cap in enumerate(caps) if i % 4 == 3]
    fit = [cap for i, cap in enumerate(caps) if i % 4 != 3]
    assert (found.n_tokens, found.n_held_out) == (9 * (40 - skip), 2 * (40 - skip))
    last = lens.n_layers - 1
    assert found.layers == tuple(range(last))
    for layer in found.layers:
        x, y = rows(fit, layer, skip), rows(fit, last, skip)
        mean, goal = x.mean(0), (y - x).mean(0)
        level = (x - mean).square().mean()
        # A ridge is so many rows more that ask for a change of 0.
        more = (len(x) * RIDGE * level).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        change = torch.linalg.lstsq(
            torch.cat([x - mean, more]), torch.cat([y - x - goal, torch.zeros_like(more)])
        ).solution
        assert_near(found.changes[layer], change, CLOSE)
        assert_near(found.biases[layer], goal - mean @ change, CLOSE, least=float(y.abs().max()))
        for caps_of, error in ((out, found.held_out_errors), (fit, found.fitted_errors)):
            x, y = rows(caps_of, layer, skip), rows(caps_of, last, skip)
            guess = x + (x - mean) @ change + goal
            total = (y - y.mean(0)).square().sum()
            assert error[layer] == pytest.approx(float((guess - y).square().sum() / total))
        x, y = rows(out, layer, skip), rows(out, last, skip)
        still = float((x - y).square().sum() / (y - y.mean(0)).square().sum())
        assert found.untranslated_errors[layer] == pytest.approx(still)
        translated = found.translate(layer, rows(out, layer))
        x = rows(out, layer)
        assert_near(translated, x + (x - mean) @ change + goal, CLOSE)


def test_it_explains_more_than_the_logit_lens_and_is_applied_by_it() -> None:
    lens = demo_lens(dtype="float32")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    pieces = [text[at : at + 300] for at in range(0, 18_000, 300)]
    found = tuned_lens(lens.capture_many(pieces, residual="all", logits=None), ridge=1e-2)
    for row in found.table():
        assert row["held_out_error"] < row["untranslated_error"]
        assert row["fitted_error"] <= row["held_out_error"]
    cap = lens.capture(text[18_000:18_300], residual="all")
    plain, tuned = logit_lens(cap, lens), logit_lens(cap, lens, translator=found)
    assert tuned.translated and not plain.translated
    assert float(tuned.kl_nats[0].mean()) < float(plain.kl_nats[0].mean())
    assert torch.equal(tuned.top_ids[-1], plain.top_ids[-1])
    assert float(tuned.kl_nats[-1].max()) == 0.0
    moved = lens.unembed(found.translate(1, cap.residual[1])).softmax(-1).topk(5)
    assert_near(tuned.top_probabilities[1], moved.values, 1e-4)


def test_saved_and_loaded(tmp_path: Path) -> None:
    lens, caps = tiny()
    found = tuned_lens(caps)
    path = found.save(tmp_path / "tuned.safetensors")
    again = TunedLens.load(path)
    assert again.to_dict() == found.to_dict() == json.loads(json.dumps(found.to_dict()))
    assert torch.equal(again.changes, found.changes) and torch.equal(again.biases, found.biases)
    first = logit_lens(caps[0], lens, translator=found)
    assert torch.equal(first.kl_nats, logit_lens(caps[0], lens, translator=again).kl_nats)
    caps[0].save(tmp_path / "capture.tlc")
    with pytest.raises(CorruptFileError, match=r"not a trilens\.tuned_lens"):
        TunedLens.load(tmp_path / "capture.tlc")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="does not fit its own hash"):
        TunedLens.load(path)


def test_what_is_refused() -> None:
    lens, caps = tiny()
    few = lens.d_model // 40  # with every 5th held out, fewer tokens than rows of a map
    with pytest.raises(TextError, match=rf"at least {lens.d_model + 1} \(d_model \+ 1\) and 2"):
        tuned_lens(caps[:few])
    with pytest.raises(TextError, match="0 tokens"):
        tuned_lens([])
    with pytest.raises(TextError, match="0 held out"):
        tuned_lens(caps, held_out_every=99)
    with pytest.raises(ValueRangeError, match="ridge -1"):
        tuned_lens(caps, ridge=-1)
    with pytest.raises(ValueRangeError, match="held_out_every"):
        tuned_lens(caps, held_out_every=1)
    with pytest.raises(UsageError, match="one Capture"):
        tuned_lens(caps[0])  # type: ignore[arg-type]
    ids = caps[0].token_ids
    with pytest.raises(NotStoredError, match="capture 0 holds the last token alone"):
        tuned_lens([lens.capture(ids)])
    with pytest.raises(NotStoredError, match="the last layer"):
        tuned_lens([lens.capture(ids, residual="all", layers=[0])])
    other = trilens.Lens(build("gpt2"))
    with pytest.raises(IncomparableError, match="capture 1 is of another model"):
        tuned_lens([caps[0], other.capture(ids, residual="all")])
    found = tuned_lens(caps)
    with pytest.raises(IncomparableError, match="tuned lens is of LlamaForCausalLM"):
        logit_lens(other.capture(ids), other, translator=found)
    with pytest.raises(AbsentLayerError, match="layer 7 has no map"):
        found.translate(7, caps[0].residual[0])
    caps[2].residual[0][3] = torch.inf
    with pytest.raises(NonFiniteError, match="capture 2 has NaN or Inf"):
        tuned_lens(caps)


def test_a_stream_that_does_not_vary_needs_a_ridge() -> None:
    _, caps = tiny()
    for cap in caps:
        cap.residual[0][:, 1] = 0.0
    with pytest.raises(NonFiniteError, match="layer 0 has no unique map"):
        tuned_lens(caps, ridge=0)
    assert tuned_lens(caps, ridge=1e-4).held_out_errors[0] < 2.0
