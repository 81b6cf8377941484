"""A rotation folded into the weights: the same outputs, no outliers, and files for engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trilens
from gguf_cases import saved_with_tokenizer
from tolerances import assert_near
from trilens.checkpoint import folded_rotation as subject
from trilens.checkpoint.folded_heads import ValueHeads
from trilens.checkpoint.folded_rotation import fold_rotation
from trilens.errors import UsageError

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "gemma": {"head_dim": 64},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "phi3": {"pad_token_id": 1},
}


VALUES = {"phi3": "model.layers.0.self_attn.qkv_proj"}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("model_type", CASES)
def test_the_outputs_are_the_same(model_type: str, tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src", model_type, **CASES[model_type])
    report = fold_rotation(source, tmp_path / "folded")
    assert report.logit_difference < 1e-4
    assert report.untied is bool(
        CASES[model_type].get("tie_word_embeddings", model_type == "gemma")
    )
    assert_near(logits(tmp_path / "folded"), logits(source), 1e-4)
    assert len(report.norms) == 3  # two of the block, and the last one
    assert report.values == (VALUES.get(model_type, "model.layers.0.self_attn.v_proj"),)
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        for folder in (source, tmp_path / "folded")
    )
    assert not torch.allclose(first, second, atol=0.1)
    assert_near(first.square().sum(-1).detach(), second.square().sum(-1).detach(), 1e-4)


def test_outliers_are_gone_and_a_gguf_file_is_written(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.02
        weight[chosen] *= 8
    model.save_pretrained(source)
    fold_rotation(source, tmp_path / "folded")
    plan = trilens.TernaryPlan("exact", group_size=256)
    errors = []
    for folder in (source, tmp_path / "folded"):
        out = tmp_path / f"{folder.name}.gguf"
        report = trilens.ternarize(folder, out, plan=plan, format="gguf-tq2_0")
        errors += [t.relative_error for t in report.coded if "up_proj" in t.name]
    with_outliers, rotated = (error or 0.0 for error in errors)
    assert with_outliers > 0.3
    assert rotated == pytest.approx(0.19, abs=0.02)  # what Gaussian weights have


def test_values_of_each_head_are_rotated_where_they_are_made_and_read(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    attention, width = model.model.layers[0].self_attn, 64
    with torch.no_grad():
        attention.v_proj.weight[width // 2] *= 30  # a channel that is an outlier in every head
        attention.v_proj.bias.normal_()
    model.save_pretrained(source)
    report = fold_rotation(source, tmp_path / "folded")
    assert report.values and report.logit_difference < 1e-4
    assert_near(logits(tmp_path / "folded"), logits(source), 1e-4)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32)
    rows = [
        one.model.layers[0].self_attn.v_proj.weight.detach().square().sum(-1)
        for one in (model, folded)
    ]
    assert float(rows[0].max() / rows[0].mean()) > 20 > 4 > float(rows[1].max() / rows[1].mean())


def test_heads_that_do_more_than_mix_tokens_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved_with_tokenizer(tmp_path / "src")
    fold, tried = subject.fold_heads, []

    def wrong(model: torch.nn.Module, heads: ValueHeads) -> None:
        """As if channels were not alike: only where values are made."""
        tried.append(heads)
        reader = model.get_submodule(heads.reader).weight
        before = reader.clone()
        fold(model, heads)
        reader.copy_(before)

    monkeypatch.setattr(subject, "fold_heads", wrong)
    report = fold_rotation(source, tmp_path / "folded")
    assert tried and report.values == ()
    assert_near(logits(tmp_path / "folded"), logits(source), 1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "olmo2", "starcoder2", "mixtral"])
def test_what_cannot_be_rotated_is_refused(model_type: str, tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src", model_type)
    with pytest.raises(UsageError, match="rotat"):
        fold_rotation(source, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        fold_rotation(source, tmp_path / "there")
