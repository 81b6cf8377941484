"""transformers' own BitNet layout: written from trits, loaded without trilens, read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_cases import load, saved
from tolerances import assert_near
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.hf_bitnet import validate_bitnet
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import CorruptFileError, UsageError
from trilens.ternary.packed.linear import TernaryLinear

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import AutoBitLinear
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
layers = {n: m for n, m in model.named_modules() if isinstance(m, AutoBitLinear)}
weights = {n: m.weight.float() * m.weight_scale.float() for n, m in layers.items()}
logits = model(torch.arange(1, 9)[None]).logits
torch.save({"weights": weights, "logits": logits}, sys.argv[2])
assert "trilens" not in sys.modules
"""


@torch.no_grad()
def test_a_plain_transformers_loads_it(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "packed", plan=TernaryPlan("exact"))
    report = ternarize(tmp_path / "packed", tmp_path / "bitnet", format="hf-bitnet")
    assert {tensor.outcome for tensor in report.coded} == {"already ternary"}
    assert all(tensor.decoded_exactly for tensor in report.tensors)
    assert "BitNet" in (tmp_path / "bitnet" / "README.md").read_text()
    out = tmp_path / "found.pt"
    command = [sys.executable, "-c", PROGRAM, tmp_path / "bitnet", out]
    # transformers compiles its unpacking, which takes longer than all the rest.
    subprocess.run(command, check=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
    found = torch.load(out)
    packed = load(tmp_path / "packed")
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, TernaryLinear)}
    assert set(found["weights"]) == set(layers)
    for name, layer in layers.items():
        assert torch.equal(found["weights"][name], layer.reconstruct()), name

    def eight_bits(_: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return ((x * scale).round().clamp(-128, 127) / scale,)

    for layer in layers.values():
        layer.register_forward_pre_hook(eight_bits)
    # Its layers round their inputs to 8 bits: with that in ours too, both agree.
    assert_near(found["logits"], packed(torch.arange(1, 9)[None]).logits, 1e-4)


def test_it_becomes_the_same_ternary_checkpoint_again(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    ternarize(source, tmp_path / "packed", plan=TernaryPlan("twn"))
    ternarize(tmp_path / "packed", tmp_path / "bitnet", format="hf-bitnet")
    ternarize(tmp_path / "bitnet", tmp_path / "again")
    first, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again")
    )
    assert set(first) == set(again)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    assert validate(tmp_path / "again").coded


def test_a_scale_that_the_dtype_does_not_hold_is_told(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", dtype=torch.bfloat16)
    for scales, exact in (("float32", False), ("bfloat16", True)):
        plan = TernaryPlan("exact", scale_dtype=scales)  # type: ignore[arg-type]
        ternarize(source, tmp_path / scales, plan=plan)
        report = ternarize(tmp_path / scales, tmp_path / f"{scales}-bitnet", format="hf-bitnet")
        errors = [tensor.relative_error or 0.0 for tensor in report.coded]
        assert (max(errors) == 0.0) is exact
        assert max(errors) < 2.0**-16


def test_kept_layers_stay_plain(tmp_path: Path) -> None:
    plan = TernaryPlan(keep=(r"layers\.0\.", "down_proj"))
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "packed", plan=plan)
    ternarize(tmp_path / "packed", tmp_path / "bitnet", format="hf-bitnet")
    section = json.loads((tmp_path / "bitnet/config.json").read_text())["quantization_config"]
    kept = section["modules_to_not_convert"]
    assert "lm_head" in kept
    assert "model.layers.1.mlp.down_proj" in kept
    assert "model.layers.1.mlp.up_proj" not in kept
    assert "model.layers.0.mlp.up_proj" in kept
    names = validate_bitnet(tmp_path / "bitnet")
    assert "model.safetensors" in names
    (tmp_path / "bitnet" / "config.json").write_text("{}")
    with pytest.raises(CorruptFileError):
        validate_bitnet(tmp_path / "bitnet")


@pytest.mark.parametrize(
    ("model_type", "plan", "words"),
    [
        ("llama", TernaryPlan("exact", per="row"), "has a scale per row"),
        ("llama", TernaryPlan("planes"), "a second plane"),
        ("llama", TernaryPlan("asymmetric"), "an offset"),
        ("llama", TernaryPlan("quad"), "has four levels"),
        ("llama", TernaryPlan(rotate=True), "is rotated"),
        ("qwen2", TernaryPlan(), "k_proj.weight has a bias"),
        ("mixtral", TernaryPlan(), "one of many experts"),
        ("gpt2", TernaryPlan(), "transposed"),
    ],
)
def test_refused_by_name(model_type: str, plan: TernaryPlan, words: str, tmp_path: Path) -> None:
    ternarize(saved(model_type, tmp_path / "src"), tmp_path / "packed", plan=plan)
    with pytest.raises(UsageError, match=words):
        ternarize(tmp_path / "packed", tmp_path / "out", format="hf-bitnet")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no packed weights to write as BitNet"):
        ternarize(tmp_path / "src", tmp_path / "out", format="hf-bitnet")
