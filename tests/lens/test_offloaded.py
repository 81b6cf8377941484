"""Weights in the host's memory and on disk, brought by accelerate: the answers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import trilens
from corpus_cases import id_documents, tiny_checkpoint
from tinymodels import build
from trilens.edits import Steer

IDS = [3, 14, 15, 9, 2, 6]


def offloaded(how: str, folder: Path) -> trilens.Lens:
    model = build("llama")
    if how == "cpu":
        return trilens.Lens(cpu_offload(model, torch.device("cpu")))
    if how == "disk":
        return trilens.Lens(disk_offload(model, folder, torch.device("cpu")))
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    for layer in range(model.config.num_hidden_layers):
        places[f"model.layers.{layer}"] = "disk" if layer % 2 else "cpu"
    return trilens.Lens(
        dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    )


@pytest.mark.parametrize("how", ["cpu", "disk", "both"])
def test_captures_edits_generation_gradients_and_stores(how: str, tmp_path: Path) -> None:
    here, away = trilens.Lens(build("llama")), offloaded(how, tmp_path / "weights")
    assert any(parameter.is_meta for parameter in away.model.parameters())
    options: dict[str, Any] = {
        "residual": "all",
        "attention": True,
        "gates": True,
        "sites": ["attn.out", "mlp.post"],
        "edits": [Steer("resid_post", vector=torch.ones(here.d_model), layers=[1])],
    }
    one, other = here.capture(IDS, **options), away.capture(IDS, **options)
    assert torch.equal(one.logits, other.logits)
    for layer in range(here.n_layers):
        assert torch.equal(one.residual[layer], other.residual[layer])
        assert torch.equal(one.sites["mlp.post", layer], other.sites["mlp.post", layer])
        assert torch.equal(one.gates.get("mlp.gate", layer), other.gates.get("mlp.gate", layer))
        assert torch.equal(one.attention.get_layer(layer), other.attention.get_layer(layer))
    assert not torch.equal(one.logits, here.capture(IDS).logits)
    written = [lens.generate(IDS, max_new_tokens=4).token_ids.tolist() for lens in (here, away)]
    assert written[0] == written[1]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[..., -1, 5]

    found = [lens.gradients(IDS, metric, sites=["resid_post"], layers=[0]) for lens in (here, away)]
    assert torch.equal(*(each.gradients["resid_post", 0] for each in found))
    store = trilens.StoreOptions(context=16, shard_tokens=64, layers=(0, 1))
    for lens, name in ((here, "here"), (away, "away")):
        trilens.capture_corpus(lens, id_documents(8), tmp_path / name, options=store)
    for layer in (0, 1):
        kept = [
            trilens.open_store(tmp_path / name)["resid_post", layer].to_torch()
            for name in ("here", "away")
        ]
        assert torch.equal(*kept)


def test_a_checkpoint_that_is_placed_as_it_is_loaded(tmp_path: Path) -> None:
    """`device_map` as the command line gives it, and with blocks that stay on disk."""
    folder = tiny_checkpoint(tmp_path / "model")
    here = trilens.Lens.from_pretrained(folder)
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers": "cpu"}
    for device_map in ("auto", places, {**places, "model.layers": "disk"}):
        away = trilens.Lens.from_pretrained(folder, device_map=device_map)
        on_disk = device_map != "auto" and device_map["model.layers"] == "disk"
        assert any(parameter.is_meta for parameter in away.model.parameters()) == on_disk
        one, other = (lens.capture(IDS, residual="all", gates=True) for lens in (here, away))
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.residual[1], other.residual[1])
        written = [lens.generate(IDS, max_new_tokens=3).token_ids for lens in (here, away)]
        assert torch.equal(*written)
