"""Gates as sites: an edit there is an edit of the gate, in prefill and in decoding."""

from __future__ import annotations

import math

import pytest
import torch

import trilens
from tinymodels import build, prompt_ids
from trilens.axes import GATES_AS_SITES
from trilens.edits import Ablate, Custom, Patch, Scale
from trilens.errors import EditError, SiteError
from trilens.lens.lens import Lens

pytestmark = pytest.mark.usefixtures("quiet")

# Each gate by another module or kernel; nemotron_h clamps its steps from below.
GATES = {
    "afmoe": {"attn.out_gate"},
    "qwen3_next": {"attn.out_gate", "mlp.shared_gate", "mixer.decay", "mixer.beta", "mixer.z"},
    "kimi_linear": {"mixer.decay", "mixer.beta", "mixer.out_gate"},
    "mamba": {"mixer.dt", "mixer.z"},
    "bamba": {"mixer.dt", "mixer.z"},
    "lfm2": {"mixer.input", "mixer.out_gate"},
    "gemma3n_text": {"block.gate"},
    "rwkv": {"mlp.receptance", "mixer.receptance"},
    "xlstm": {"mixer.decay", "mixer.out_gate"},
    "rwkv7": {"mixer.decay", "mixer.in_context_rate", "mixer.value_mix", "mixer.out_gate"},
}


def lens_of(model_type: str) -> tuple[Lens, torch.Tensor]:
    if model_type == "rwkv7":
        path = trilens.demo_path("rwkv7")
        return Lens.from_pretrained(path, dtype="float32"), prompt_ids("llama", 17)
    return Lens(build(model_type)), prompt_ids(model_type, 17)


@pytest.mark.parametrize("model_type", list(GATES))
def test_closing_a_gate_closes_that_gate_and_no_earlier_one(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    clean = lens.capture(ids, gates=True)
    names = [name for name in lens.site_layers if name in GATES_AS_SITES]
    assert set(names) == GATES[model_type]
    for name in names:
        layer = lens.site_layers[name][0]
        same = lens.capture(ids, edits=[Custom(name, torch.clone)])
        assert torch.equal(same.logits, clean.logits), name
        closed = lens.capture(ids, gates=True, edits=[Ablate(name, layer=layer, positions=9)])
        before, after = clean.gates.get(name, layer), closed.gates.get(name, layer)
        assert before[9].abs().max() > 0
        assert torch.equal(after[9], torch.zeros_like(after[9])), name
        assert torch.equal(after[:9], before[:9])
        assert not torch.equal(closed.logits[9:], clean.logits[9:]), name
        assert torch.isfinite(closed.logits).all()


@pytest.mark.parametrize("model_type", ["mamba", "bamba", "qwen3_next", "kimi_linear", "rwkv7"])
def test_gates_in_steps_are_those_of_one_pass(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    inner = ("mixer.dt", "mixer.decay", "mixer.beta")
    names = [name for name in lens.site_layers if name in inner]
    edits = [Scale(name, 0.5, positions=slice(14, None)) for name in names]
    made = lens.generate(ids, max_new_tokens=5, edits=edits, capture={"sites": names})
    whole = lens.capture(made.capture.token_ids, edits=edits, sites=names)
    for key in whole.sites:
        held, wanted = made.capture.sites[key], whole.sites[key]
        assert (held - wanted).abs().max() <= 1e-4 * wanted.abs().max(), key


def test_a_site_is_what_the_gates_function_is_given() -> None:
    lens, ids = lens_of("qwen3_next")
    cap = lens.capture(ids, gates=True, sites=["attn.out_gate", "mixer.z", "mixer.decay"])
    functions = {
        "attn.out_gate": torch.sigmoid,
        "mixer.z": torch.nn.functional.silu,
        "mixer.decay": torch.exp,
    }
    for name, function in functions.items():
        for layer in cap.sites.layers(name):
            value = function(cap.sites[name, layer])
            assert torch.equal(value.flatten(1), cap.gates.get(name, layer)), (name, layer)


def test_a_gate_that_is_no_site_says_why() -> None:
    lens, ids = lens_of("mamba")
    with pytest.raises(EditError, match=r"makes it of mixer\.dt and mixer\.rate"):
        lens.capture(ids, edits=[Ablate("mixer.decay")])
    with pytest.raises(SiteError, match=r"read and not edited: capture with gates=True"):
        lens.capture(ids, sites=["mixer.rate"])
    lens, ids = lens_of("rwkv")
    with pytest.raises(EditError, match="a parameter, the same for every token"):
        lens.capture(ids, edits=[Scale("mixer.decay", 0.5)])


def test_a_sigmoid_is_closed_by_minus_infinity() -> None:
    lens, ids = lens_of("afmoe")
    layer = lens.site_layers["attn.out_gate"][0]
    shut = [Ablate("attn.out_gate", layer=layer, units=[0])]
    cap = lens.capture(ids, sites=["attn.out_gate"], layers=[layer], edits=shut)
    assert (cap.sites["attn.out_gate", layer][:, 0] == -math.inf).all()


STATES = ("mamba", "bamba", "jamba", "qwen3_next", "kimi_linear", "rwkv7")
POSITION = 8


@pytest.mark.parametrize("model_type", STATES)
def test_a_state_is_changed_between_two_tokens(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    layer = lens.state_layers[0]
    clean = lens.capture(ids, states=(POSITION,))
    state = clean.states.get(layer, position=POSITION)
    seen: list[torch.Tensor] = []

    def look(values: torch.Tensor) -> torch.Tensor:
        seen.append(values)
        return values.clone()

    same = lens.capture(ids, edits=[Custom("state", look, layer=layer, positions=POSITION)])
    assert (seen[0][0] - state).abs().max() <= 1e-5 * state.abs().max()
    scale = clean.logits.abs().max()
    assert (same.logits - clean.logits).abs().max() <= 1e-5 * scale
    # The state of the very text, put where it was forgotten, brings the text back.
    forgotten = Ablate("state", layer=layer, positions=POSITION)
    put = Patch("state", layer=layer, source=state, positions=POSITION)
    lost = lens.capture(ids, edits=[forgotten])
    kept = lens.capture(ids, edits=[put])
    assert (lost.logits[: POSITION + 1] - clean.logits[: POSITION + 1]).abs().max() <= 1e-5 * scale
    assert (lost.logits[POSITION + 1 :] - clean.logits[POSITION + 1 :]).abs().max() > 1e-3 * scale
    assert (kept.logits - clean.logits).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", "rwkv7"])
def test_a_forgotten_state_is_that_of_a_text_which_begins_there(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    layer = lens.state_layers[-1]
    asked = {"residual": None, "effective": True, "layers": [layer]}
    pattern = lens.capture(ids, **asked).effective.pattern(layer)
    out = lens.capture(ids, sites=["mixer.in", "mixer.out"], layers=[layer])
    lost = lens.capture(
        ids,
        sites=["mixer.in", "mixer.out"],
        layers=[layer],
        edits=[Ablate("state", layer=layer, positions=POSITION)],
    )
    assert torch.equal(out.sites["mixer.in", layer], lost.sites["mixer.in", layer])
    # A query reads nothing of what stood before: its output differs where it read some of it.
    earlier = max(
        float(pattern.rows([16], head)[0][0, : POSITION + 1].abs().max())
        for head in range(pattern.heads)
    )
    differs = (out.sites["mixer.out", layer] - lost.sites["mixer.out", layer])[16].abs().max()
    assert (differs > 0) == (earlier > 0)


@pytest.mark.parametrize("model_type", STATES)
def test_states_in_steps_and_batches_are_those_of_one_pass(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    layer = lens.state_layers[0]
    edits = [Scale("state", 0.25, layer=layer, positions=[5, 16, 18])]
    made = lens.generate(ids, max_new_tokens=5, edits=edits, capture={"residual": "all"})
    whole = lens.capture(made.capture.token_ids, edits=edits, residual="all")
    for held in range(lens.n_layers):
        one, other = made.capture.residual[held], whole.residual[held]
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    short = [ids[0].tolist(), ids[0, :9].tolist()]
    both = lens.capture_many(short, edits=[Scale("state", 0.25, layer=layer, positions=[5])])
    for prompt, cap in zip(short, both, strict=True):
        alone = lens.capture(prompt, edits=[Scale("state", 0.25, layer=layer, positions=[5])])
        assert (cap.logits - alone.logits).abs().max() <= 1e-4 * alone.logits.abs().max()


def test_what_a_state_edit_cannot_be() -> None:
    lens, ids = lens_of("mamba")
    edit = Ablate("state", layer=0, positions=3)
    with pytest.raises(EditError, match="layer 0 is edited, so that its recurrence is none"):
        lens.capture(ids, states=True, edits=[edit])
    lens.capture(ids, states=True, layers=[1], edits=[edit])
    clean = lens.capture(ids, states=True)
    with pytest.raises(EditError, match=r"give a tensor \[128, 8\], such as cap\.states\.get"):
        lens.capture(ids, edits=[Patch("state", layer=0, source=clean)])
    with pytest.raises(SiteError, match="a state is captured with states="):
        lens.capture(ids, sites=["state"])
    lens, ids = lens_of("rwkv")
    with pytest.raises(EditError, match="has several parts"):
        lens.capture(ids, edits=[Ablate("state", positions=3)])
    lens = Lens(build("recurrent_gemma"))
    with pytest.raises(EditError, match="keeps its state inside"):
        lens.capture(prompt_ids("recurrent_gemma", 9), edits=[Ablate("state", positions=3)])
