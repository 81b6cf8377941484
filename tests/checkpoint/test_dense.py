"""Dense weights from a ternary checkpoint: those of the packed layers, for any transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_cases import load, saved
from tinymodels import forward_kwargs, prompt_ids
from tolerances import assert_near
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import UsageError
from trilens.ternary.packed.linear import TernaryLinear

PLANS = {
    "matrix": TernaryPlan(),
    "groups": TernaryPlan("exact", group_size=16),
    "planes": TernaryPlan("planes", per="row"),
    "offsets": TernaryPlan("asymmetric", group_size=16),
    "compact": TernaryPlan(storage="compact", scale_dtype="bfloat16"),
    "rotated": TernaryPlan("exact", per="row", rotate=True),
}


@torch.no_grad()
def logits(model, model_type: str) -> torch.Tensor:
    return model(**forward_kwargs(model_type, prompt_ids(model_type, 12))).logits


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss", "mamba", "falcon"])
def test_the_weights_are_those_of_the_packed_layers(
    model_type: str, plan: str, tmp_path: Path
) -> None:
    source = saved(model_type, tmp_path / "src")
    ternarize(source, tmp_path / "packed", plan=PLANS[plan])
    report = ternarize(tmp_path / "packed", tmp_path / "dense", format="dense")
    assert {t.outcome for t in report.coded} == {"dense"}
    packed, dense = load(tmp_path / "packed"), load(tmp_path / "dense")
    assert not any(isinstance(m, TernaryLinear) for m in dense.modules())
    packed.dequantize()
    held = dict(dense.named_parameters())
    assert set(held) == {name for name, _ in packed.named_parameters()}
    for name, parameter in packed.named_parameters():
        assert torch.equal(held[name], parameter), name
    assert_near(logits(dense, model_type), logits(packed, model_type), 1e-6)
    # The same tensors as the source, by name, shape and dtype.
    old, new = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "dense/model.safetensors"),
    )
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
        n: (t.shape, t.dtype) for n, t in old.items()
    }


def test_a_plain_transformers_loads_them(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "packed")
    ternarize(tmp_path / "packed", tmp_path / "dense", format="dense")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(model(torch.arange(1, 9)[None]).logits, sys.argv[2])\n"
        "assert 'trilens' not in sys.modules"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", program, tmp_path / "dense", out], check=True)
    with torch.no_grad():
        packed = load(tmp_path / "packed")(torch.arange(1, 9)[None]).logits
    assert_near(torch.load(out), packed, 1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize(("scale_dtype", "exact"), [("bfloat16", True), ("float32", False)])
def test_rounding_is_reported(scale_dtype: str, exact: bool, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src", dtype=torch.bfloat16)
    plan = TernaryPlan(per="row", scale_dtype=scale_dtype)  # type: ignore[arg-type]
    ternarize(source, tmp_path / "packed", plan=plan)
    report = ternarize(tmp_path / "packed", tmp_path / "dense", format="dense")
    errors = [t.relative_error for t in report.coded]
    assert ("bit for bit" in report.verdict) == exact
    assert all(e == 0 for e in errors) if exact else all(0 < e < 2**-16 for e in errors)
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_what_is_written_and_refused(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    with pytest.raises(UsageError, match="no packed weights"):
        ternarize(source, tmp_path / "dense", format="dense")
    packed = ternarize(source, tmp_path / "packed")
    dry = ternarize(tmp_path / "packed", tmp_path / "dense", format="dense", dry_run=True)
    assert not (tmp_path / "dense").exists()
    report = ternarize(tmp_path / "packed", tmp_path / "dense", format="dense")
    assert dry.size_bytes == report.size_bytes == packed.size_bytes_before
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"README.md", "README.source.md", "config.json", "model.safetensors"} <= names
    with pytest.raises(UsageError, match="no empty directory"):
        ternarize(tmp_path / "packed", tmp_path / "dense", format="dense")
    with pytest.raises(UsageError, match="ternary already"):
        ternarize(tmp_path / "packed", tmp_path / "x", format="dense", plan=TernaryPlan("exact"))
    assert not list(tmp_path.glob(".*"))
    validate(tmp_path / "packed")
