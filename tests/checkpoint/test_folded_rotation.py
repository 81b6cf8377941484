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


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "olmo2", "starcoder2", "mixtral"])
def test_what_cannot_be_rotated_is_refused(model_type: str, tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src", model_type)
    with pytest.raises(UsageError, match="rotat"):
        fold_rotation(source, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        fold_rotation(source, tmp_path / "there")
