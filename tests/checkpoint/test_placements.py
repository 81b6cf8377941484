"""`device_map` and `dtype`, as transformers with accelerate places a ternary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import load, saved, tensors
from tinymodels import forward_kwargs, prompt_ids
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.lens.lens import Lens
from trilens.ternary.packed.linear import TernaryLinear

PLACEMENTS: dict[str, Any] = {
    "cpu": "cpu",
    "auto": "auto",
    "whole": {"": "cpu"},
    "parts": {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("placed")
    ternarize(saved("llama", root / "src"), root / "out", plan=TernaryPlan("planes", group_size=24))
    return root / "out"


def logits(model: Any, model_type: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**forward_kwargs(model_type, prompt_ids(model_type, 12))).logits


def layers(model: Any) -> list[TernaryLinear]:
    return [module for module in model.modules() if isinstance(module, TernaryLinear)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_is_the_plain_load(
    placement: str, dtype: torch.dtype, out: Path, tmp_path: Path
) -> None:
    plain = load(out, dtype=dtype)
    placed = load(out, dtype=dtype, device_map=PLACEMENTS[placement])
    assert placed.dtype == dtype
    assert len(layers(placed)) == len(layers(plain)) > 0
    assert all(layer.scale.dtype == torch.float32 for layer in layers(placed))
    assert all(layer.codes.dtype == torch.uint8 for layer in layers(placed))
    assert torch.equal(logits(placed), logits(plain))
    if dtype == torch.bfloat16:
        placed.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again", device_map=PLACEMENTS[placement])
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(plain))
        once, twice = tensors(out), tensors(tmp_path / "again")
        coded = {name for name in once if name.endswith(("codes", "scale"))}
        assert coded == {name for name in twice if name.endswith(("codes", "scale"))}
        assert all(torch.equal(once[name], twice[name]) for name in coded)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_transposed_and_merged_tensors_are_placed(model_type: str, tmp_path: Path) -> None:
    ternarize(saved(model_type, tmp_path / "src"), tmp_path / "out")
    placed = load(tmp_path / "out", device_map="auto")
    assert torch.equal(logits(placed, model_type), logits(load(tmp_path / "out"), model_type))


def test_blocks_on_disk_compute_the_same(out: Path, tmp_path: Path) -> None:
    placement: dict[str, Any] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    n_layers = load(out).config.num_hidden_layers
    placement |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(n_layers)}
    offloaded = load(out, device_map=placement, offload_folder=tmp_path / "offload")
    assert layers(offloaded)[-1].codes.device.type == "meta"
    assert torch.equal(logits(offloaded), logits(load(out)))


def test_the_lens_takes_a_placement(out: Path) -> None:
    (out / "tokenizer_config.json").unlink()  # without a vocabulary beside it
    lens = Lens.from_pretrained(str(out), device_map="auto")
    ids = prompt_ids("llama", 12)
    ours = lens.capture(ids, residual="all").residual.get_layer(1)
    theirs = Lens.from_pretrained(str(out)).capture(ids, residual="all").residual.get_layer(1)
    assert torch.equal(ours, theirs)
