"""Checkpoints saved from wrapped or adapted models: refused by name, when loaded and ternarized."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trilens
from checkpoint_cases import saved
from trilens.checkpoint import ternarize
from trilens.errors import CorruptFileError, UsageError
from trilens.models.loading import load


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("plain"))


def changed(plain: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(plain, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_wrappers_prefix_is_named(plain: Path, tmp_path: Path, prefix: str) -> None:
    tensors = load_file(plain / "model.safetensors")
    folder = changed(plain, tmp_path / "in", {f"{prefix}{k}": v for k, v in tensors.items()})
    words = f"strip '{prefix}' from the names".replace(".", r"\.")
    with pytest.raises(CorruptFileError, match=words):
        load(folder)
    with pytest.raises(CorruptFileError, match=words):
        ternarize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compiled_layer_and_unmerged_factors_are_named(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    layer = {k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in tensors.items()}
    with pytest.raises(CorruptFileError, match=r"named like .*_orig_mod.*a compiled model"):
        load(changed(plain, tmp_path / "layer", layer))
    factors = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.rand(4, 64),
        "model.layers.0.self_attn.q_proj.lora_B.weight": torch.rand(64, 4),
    }
    folder = changed(plain, tmp_path / "lora", tensors | factors)
    for run in (load, lambda source: ternarize(source, tmp_path / "out")):
        with pytest.raises(CorruptFileError, match=r"2 tensors of an adapter .*merge_and_unload"):
            run(folder)


def test_matrices_in_float8_are_listed(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    some = {k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in tensors.items()}
    report = trilens.ternarize(changed(plain, tmp_path / "some", some), tmp_path / "out")
    kept = [row for row in report.table() if row["outcome"] != "ternary"]
    assert {row["outcome"] for row in kept} == {"kept: stored as F8_E4M3"}
    assert len(kept) == sum("q_proj" in name for name in tensors)
    every = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    with pytest.raises(UsageError, match=r"matrices kept: stored as F8_E4M3"):
        trilens.ternarize(changed(plain, tmp_path / "all", every), tmp_path / "none")
