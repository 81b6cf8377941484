"""LoRA adapters on packed layers: trained, saved, merged and taken out again, with PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import trilens
from checkpoint_cases import saved
from tolerances import assert_near
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.errors import UsageError
from trilens.ternary.packed.linear import TernaryLinear

CASES = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D, whose weight is transposed
    "mamba": ["in_proj", "x_proj"],
}
IDS = torch.arange(1, 13)[None]


@pytest.fixture(params=CASES)
def adapted(request, tmp_path: Path):
    """A ternary model with trained-like adapters, and what it was loaded from."""
    ternarize(saved(request.param, tmp_path / "src"), tmp_path / "out", plan=TernaryPlan(per="row"))
    config = LoraConfig(r=3, target_modules=CASES[request.param], task_type="CAUSAL_LM")
    model = get_peft_model(load(tmp_path / "out"), trilens.enable_lora(config)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model, tmp_path / "out"


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def test_adapters_add_to_the_layer(adapted) -> None:
    model, folder = adapted
    dense = load(folder)
    dense.dequantize()
    reference = get_peft_model(dense, LoraConfig(**_own(model))).eval()
    peft.set_peft_model_state_dict(reference, peft.get_peft_model_state_dict(model))
    assert not torch.equal(logits(model), logits(load(folder)))
    assert_near(logits(model), logits(reference), 1e-5)


def _own(model) -> dict:
    config = model.peft_config["default"]
    own = {"r": config.r, "target_modules": config.target_modules, "task_type": config.task_type}
    return own | {"fan_in_fan_out": model.config.model_type == "gpt2"}


def test_adapters_train_and_trits_do_not(adapted) -> None:
    model, _ = adapted
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(("codes", "scale"))}
    model.train()
    model(IDS, labels=IDS).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_merged_layers_are_dense_and_hold_the_sum(adapted, tmp_path: Path) -> None:
    model, _ = adapted
    first = logits(model)
    model.merge_adapter()
    assert_near(logits(model), first, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), first)  # the packed layers are back, bit for bit
    merged = model.merge_and_unload()
    assert_near(logits(merged), first, 1e-5)
    kinds = {type(m) for n, m in merged.named_modules() if n.endswith(("q_proj", "c_attn"))}
    assert TernaryLinear not in kinds
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_adapters_are_saved_and_loaded(adapted, tmp_path: Path) -> None:
    model, folder = adapted
    model.save_pretrained(tmp_path / "adapter")
    config = trilens.enable_lora(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter", config=config).eval()
    assert torch.equal(logits(again), logits(model))


def test_dora_reads_the_weight(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(load(tmp_path / "out"), trilens.enable_lora(config)).eval()
    assert_near(logits(model), logits(load(tmp_path / "out")), 1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_by_peft_s_own_layer_is_an_error(safe_merge: bool, tmp_path: Path) -> None:
    """It would add to a tensor that is thrown away."""
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    config._register_custom_module({TernaryLinear: peft.tuners.lora.layer.Linear})
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = get_peft_model(load(tmp_path / "out"), config)
    with pytest.raises(UsageError, match="enable_lora"):
        model.merge_and_unload(safe_merge=safe_merge)


WRITES = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "item": lambda w: w.__setitem__(0, 1),
    "data": lambda w: setattr(w, "data", torch.zeros(2)),
    "data +=": lambda w: w.data.add_(1),
    "copy_": lambda w: w.copy_(w),
    "init": nn.init.zeros_,
    "out": lambda w: torch.add(w, 1, out=w),
}


@pytest.mark.parametrize("write", WRITES)
def test_the_weight_of_a_packed_layer_is_read_only(write: str) -> None:
    quant = trilens.PerLayerQuant.quantize(torch.randn(4, 8), "w")
    layer = TernaryLinear.from_quant(quant)
    with pytest.raises(UsageError, match="cannot be written into"):
        WRITES[write](layer.weight)
    for read in (layer.weight + 1, layer.weight.T, layer.weight.float(), layer.weight.clone()):
        assert type(read) is torch.Tensor
    assert torch.equal(layer.weight, quant.reconstruct())
