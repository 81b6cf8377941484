"""Which tensors are block linears, seen on families of very different shape."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoint_cases import saved
from tinymodels import tiny_config
from trilens.checkpoint.format.skeleton import _computes_linear, build_skeleton, choose
from trilens.errors import ConfigError
from trilens.io.weight_files import read_headers
from trilens.models.build import read_config, read_settings


def choices(model_type: str, folder: Path):
    saved(model_type, folder)
    headers = read_headers(folder)
    config, _ = read_config(folder, read_settings(folder), trusted=False)
    model = build_skeleton(config, headers)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return {choice.name: choice for choice in choose(model, headers)}


def ends(found, storage: str) -> set[str]:
    """The last names of the tensors with this storage."""
    return {
        ".".join(part for part in c.name.split(".")[-3:] if not part.isdigit())
        for c in found.values()
        if c.storage == storage
    }


def test_a_plain_transformer(tmp_path: Path) -> None:
    found = choices("llama", tmp_path)
    attention = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    mlp = {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert ends(found, "layer") == attention | mlp
    assert ends(found, "merged") == ends(found, "experts") == set()
    reasons = {c.reason for c in found.values() if c.storage == "kept"}
    assert reasons == {"embedding", "unembedding", "one-dimensional"}


def test_transposed_fused_and_tied(tmp_path: Path) -> None:
    found = choices("gpt2", tmp_path)
    layers = [c for c in found.values() if c.storage == "layer"]
    assert {c.name.split(".")[-2] for c in layers} == {"c_attn", "c_proj", "c_fc"}
    assert all(c.transposed for c in layers)
    assert {c.reason for c in found.values() if c.storage == "kept"} == {
        "embedding",
        "one-dimensional",
    }


def test_merged_experts_and_their_router(tmp_path: Path) -> None:
    found = choices("mixtral", tmp_path)
    assert ends(found, "merged") == {f"{w}.weight" for w in ("w1", "w2", "w3")}
    assert all("gate" not in c.name for c in found.values() if c.storage != "kept")


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    found = choices("gpt_oss", tmp_path)
    experts = [c for c in found.values() if c.storage == "experts"]
    assert {c.name.split(".")[-1] for c in experts} == {"gate_up_proj", "down_proj"}
    assert all(c.transposed for c in experts)
    assert not any("router" in c.name for c in found.values() if c.storage != "kept")


def test_a_linear_router_is_kept(tmp_path: Path) -> None:
    found = choices("jetmoe", tmp_path)
    routers = [c for c in found.values() if c.reason == "router"]
    assert routers
    assert all("router" in c.name for c in routers)
    assert all(c.is_matrix for c in routers)


def test_convolutions_and_states_are_kept(tmp_path: Path) -> None:
    found = choices("mamba", tmp_path)
    projections = {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert {c.name.split(".")[-2] for c in found.values() if c.storage == "layer"} == projections
    reasons = {c.name.split(".")[-2]: c.reason for c in found.values() if "conv1d.w" in c.name}
    assert reasons == {"conv1d": "weight of a Conv1d"}


def test_vectors_of_rank_3_are_no_experts(tmp_path: Path) -> None:
    found = choices("rwkv", tmp_path)
    mixes = [c for c in found.values() if "time_mix" in c.name]
    assert mixes
    assert not any(c.is_matrix for c in mixes)


def test_blocks_that_share_weights_fall_back(tmp_path: Path) -> None:
    found = choices("zamba", tmp_path)
    tied = [c for c in found.values() if c.reason == "tied to another tensor"]
    assert tied
    assert all(c.is_matrix and c.storage == "kept" for c in tied)


def test_a_subclass_that_computes_as_linear_counts(tmp_path: Path) -> None:
    found = choices("falcon", tmp_path)
    assert "query_key_value" in {
        c.name.split(".")[-2] for c in found.values() if c.storage == "layer"
    }

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bgi,goi->bgo", x, self.weight.view(2, -1, self.in_features))

    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError

    with torch.device("meta"):
        assert _computes_linear(nn.Linear(100, 50))
        assert not _computes_linear(Doubled(100, 50))
        assert not _computes_linear(Grouped(100, 50))
        assert not _computes_linear(Broken(100, 50, bias=False))
        assert not _computes_linear(nn.Embedding(3, 4))


def test_a_configuration_that_builds_nothing() -> None:
    config = copy.deepcopy(tiny_config("llama"))
    config.hidden_act = "nonsense"
    with pytest.raises(ConfigError, match="llama"):
        build_skeleton(config, [])
