"""Rotated checkpoints: the layers turn their inputs, and what they hold is not told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoint_cases import load, saved, tensors
from gguf_cases import saved_with_tokenizer
from tinymodels import forward_kwargs, prompt_ids
from tolerances import assert_near, largest
from trilens.checkpoint import TernaryPlan, ternarize, validate
from trilens.cli.main import app
from trilens.errors import ConfigError, UsageError
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rotation import rotate, rotate_back

FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "mamba", "falcon"]


def logits(model, model_type: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**forward_kwargs(model_type, prompt_ids(model_type, 12))).logits


def by_hand(source: Path, folder: Path, coded: list[str], plan: TernaryPlan) -> Path:
    """A dense checkpoint whose matrices were rotated, coded and rotated back."""
    saved_files = {file.name: file for file in source.iterdir() if file.is_file()}
    folder.mkdir()
    for name, file in saved_files.items():
        (folder / name).write_bytes(file.read_bytes())
    for file in folder.glob("*.safetensors"):
        stored = load_file(file)
        for name in set(coded) & set(stored):
            stored[name] = turned_and_back(stored[name], name, plan)
        save_file(stored, file, {"format": "pt"})
    return folder


def turned_and_back(weights: torch.Tensor, name: str, plan: TernaryPlan) -> torch.Tensor:
    """Whichever way round the inputs stand, by the plan's own report of the shapes."""
    if weights.ndim == 3:
        return torch.stack([turned_and_back(w, name, plan) for w in weights])
    conv = ".c_" in name or ("experts." in name and name.endswith(("gate_up_proj", "down_proj")))
    matrix = weights.T if conv else weights
    quant = PerLayerQuant.quantize(
        rotate(matrix), name, rule=plan.rule, per=plan.per, group_size=plan.group_size
    )
    found = rotate_back(quant.reconstruct())
    return (found.T if conv else found).contiguous()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_model_computes_with_the_weights_turned_back(model_type: str, tmp_path: Path) -> None:
    plan = TernaryPlan("planes", per="row", rotate=True)
    source = saved(model_type, tmp_path / "src")
    report = ternarize(source, tmp_path / "out", plan=plan)
    model = load(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    assert all(layer.rotated for layer in layers)
    found = logits(model, model_type)
    wanted = logits(
        load(by_hand(source, tmp_path / "dense", [t.name for t in report.coded], plan)), model_type
    )
    assert_near(found, wanted, 1e-4, least=1.0)
    assert largest(found - logits(load(source), model_type)) > 1e-3 * largest(found)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again, model_type), found)
    assert_near(logits(again.dequantize(), model_type), found, 1e-4, least=1.0)
    assert validate(tmp_path / "out").plan == plan


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "olmo2", "gpt_neox", "falcon", "qwen3"])
def test_turning_alone_changes_no_logits(model_type: str, tmp_path: Path) -> None:
    """Weights and inputs rotated, nothing ternarized: float32 logits stay within 1e-4."""
    source = saved(model_type, tmp_path / "src")
    model = load(source)
    wanted = logits(model, model_type)
    report = ternarize(source, tmp_path / "out", dry_run=True)
    for tensor in report.coded:
        module = model.get_submodule(tensor.name.removesuffix(".weight"))
        conv = not isinstance(module, torch.nn.Linear)
        weights = module.weight.data.T if conv else module.weight.data
        rotated = rotate(weights)
        module.weight.data = rotated.T if conv else rotated
        module.register_forward_pre_hook(lambda _m, args: (rotate(args[0]), *args[1:]))
    found = logits(model, model_type)
    assert_near(found, wanted, 1e-4, least=1.0)


def test_compact_storage_and_the_command(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    common = ["ternarize", str(source), "--rule", "exact", "--rotate", "-o"]
    done = CliRunner().invoke(app, [*common, str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    compact = [*common, str(tmp_path / "b"), "--storage", "compact"]
    assert CliRunner().invoke(app, compact).exit_code == 0
    first, second = load(tmp_path / "a"), load(tmp_path / "b")
    assert torch.equal(logits(first, "llama"), logits(second, "llama"))
    assert "rotated" in repr(first)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert settings["rotation"] == "hadamard"


def test_outliers_cost_less(tmp_path: Path) -> None:
    """Weights of a heavy-tailed kind; rotated, they are as Gaussian ones."""
    torch.manual_seed(0)
    model = load(saved("llama", tmp_path / "plain"))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            drawn = torch.distributions.Laplace(0.0, 0.02).sample(parameter.shape)
            parameter.data = drawn
    model.save_pretrained(tmp_path / "src")
    errors = {}
    for rotated in (False, True):
        plan = TernaryPlan("exact", per="row", rotate=rotated)
        report = ternarize(tmp_path / "src", tmp_path / f"out{rotated}", plan=plan)
        lost = [t.relative_error for t in report.coded if t.relative_error is not None]
        errors[rotated] = sum(lost) / len(lost)
    assert errors[True] + 0.03 < errors[False]  # long rows: 0.19 against 0.26
    assert tensors(tmp_path / "outTrue").keys() == tensors(tmp_path / "outFalse").keys()


def test_what_is_refused(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src")
    plan = TernaryPlan("exact", per="row", rotate=True)
    with pytest.raises(UsageError, match="rotate"):
        ternarize(source, tmp_path / "m.gguf", plan=plan, format="gguf-tq2_0")
    ternarize(source, tmp_path / "out", plan=plan)
    with pytest.raises(UsageError, match="'rotation'"):
        ternarize(tmp_path / "out", tmp_path / "m.gguf", format="gguf-tq2_0")
    assert not (tmp_path / "m.gguf").exists()
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"hadamard"', '"givens"'))
    with pytest.raises(ConfigError, match="'givens'"):
        load(tmp_path / "out")
    with pytest.raises(UsageError, match="True or False"):
        TernaryPlan(rotate="yes")  # type: ignore[arg-type]
    model = load(saved("llama", tmp_path / "trits"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = torch.sign(weight.data)
    model.save_pretrained(tmp_path / "trits")
    with pytest.raises(UsageError, match=r"q_proj\.weight is ternary already"):
        ternarize(tmp_path / "trits", tmp_path / "fresh", plan=plan)
