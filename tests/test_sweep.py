"""A quick subset of the family sweep; `make sweep` runs all causal-LM types."""

from __future__ import annotations

import pytest

from tinymodels import TYPES, build
from tinymodels.checks import family_sites, sweep_one, why_not_full
from trilens.errors import AnatomyError
from trilens.lens.lens import Lens
from trilens.models.families import load_families

pytestmark = pytest.mark.usefixtures("quiet")

# One of each mechanism: rotary and grouped queries, sinks, softcaps, sliding and chunked masks,
# sparse top-k, latent attention, local registry, shared blocks, two calls, post-norm, MoE, hybrids.
FULL = (
    "llama",
    "gpt2",
    "opt",
    "bert",
    "gpt_oss",
    "granite_swa",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "llama4_text",
    "deepseek_v3",
    "deepseek_v32",
    "doge",
    "diffllama",
    "inkling_text",
    "phi3",
    "mixtral",
    "qwen3_next",
    "zamba2",
    "recurrent_gemma",
    "cohere2",
    "minicpm3",
    "electra",
    "whisper",
)
# Attention in the model's own code: heads folded into the batch, fused, a window, an einsum.
INLINE = ("bloom", "falcon", "gpt_neo", "gptj", "xglm", "xlnet")
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
REFUSED = {
    "reformer": AnatomyError,
    "big_bird": AnatomyError,
    "blt": AnatomyError,
    "xlm": AnatomyError,
    "cpmant": AnatomyError,
}
STREAMS = ("deepseek_v4", "gemma3n_text", "qwen4_exp_text")
SEVERAL = ("longcat_flash", "hrm_text")
"""Several attentions in one block; blocks that run in several rounds."""


@pytest.mark.parametrize("model_type", (*FULL, *INLINE))
def test_captured_in_full(model_type: str) -> None:
    row, figures = sweep_one(model_type)
    assert row.outcome == "full", row.reason
    assert row.attention
    assert figures["attention_vs_eager"] is not None, "eager offers its weights here"


@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_recurrence_alone_is_captured_in_full(model_type: str) -> None:
    row, _ = sweep_one(model_type)
    assert row.outcome == "full", row.reason
    assert row.attention == ()
    assert row.effective == row.states == tuple(range(row.n_layers))
    gated = {layer for gate in row.gates if gate.name.startswith("mixer.") for layer in gate.layers}
    assert gated == set(row.states)


def test_a_recurrence_that_lacks_something_is_not_captured_in_full() -> None:
    lens = Lens(build("mamba"))
    every = lens.effective_layers
    assert why_not_full(lens, attention=False, effective=every, states=every) == ""
    for what, options in (
        ("effective attention", {"effective": every[1:], "states": every}),
        ("state", {"effective": every, "states": every[1:]}),
    ):
        assert f"no proven {what}" in why_not_full(lens, attention=False, **options)


@pytest.mark.parametrize("model_type", (*STREAMS, *SEVERAL))
def test_captured_with_streams_parts_and_rounds(model_type: str) -> None:
    row, _ = sweep_one(model_type)
    assert row.outcome == "full", row.reason
    assert len(row.attention) == row.n_layers or row.effective
    assert (model_type in STREAMS) == any(gate.name == "stream.write" for gate in row.gates)


@pytest.mark.parametrize(("model_type", "error"), REFUSED.items())
def test_refused_by_name(model_type: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        Lens(build(model_type))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3_next", "mamba", "gpt_oss", "zamba2", "bloom"]
)
def test_the_shipped_table_is_what_a_lens_finds(model_type: str) -> None:
    row = next(row for row in load_families().rows if row.model_type == model_type)
    lens = Lens(build(model_type))
    found: dict[str, tuple[int, ...]] = {}
    for gate in row.gates:
        found[gate.name] = tuple(sorted((*found.get(gate.name, ()), *gate.layers)))
    assert found == lens.gate_layers
    assert row.attention == lens.attention_layers
    assert row.effective == lens.effective_layers
    assert row.states == lens.state_layers
    assert row.n_layers == lens.n_layers
    assert (row.sites, row.no_sites) == family_sites(lens)


def test_the_shipped_table_covers_every_type() -> None:
    table = load_families()
    assert [row.model_type for row in table.rows] == list(TYPES)
    counts = table.count()
    assert counts["full"] >= 165
    assert table.n_recurrent_only >= 5
    assert table.n_gated >= 30
    assert table.n_effective >= 16
    assert table.n_sited >= 120
    assert all(row.effective or not row.no_effective for row in table.rows)
    assert sum(counts.values()) == len(TYPES)
    assert all(row.reason for row in table.rows if row.outcome != "full")
