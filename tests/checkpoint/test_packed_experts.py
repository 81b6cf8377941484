"""Experts and merged tensors of a ternary checkpoint stay packed in memory, and do all the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import trilens
from checkpoint_cases import load, saved, tensors
from tinymodels import forward_kwargs, prompt_ids
from tolerances import assert_near
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.edits import Ablate, Scale
from trilens.errors import CorruptFileError, UsageError
from trilens.lens.lens import Lens
from trilens.taps.matrices import matrices_of
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.module import PackedModule

# Stored one by one and merged; in one tensor, transposed, with biases; without the interface.
TYPES = ["mixtral", "gpt_oss", "jetmoe"]
PLANS = {
    "tensor": TernaryPlan(),
    "groups": TernaryPlan("planes", group_size=24),
    "offsets": TernaryPlan("asymmetric", per="row"),
    "compact": TernaryPlan(storage="compact"),
    "rotated": TernaryPlan(rotate=True),
}


def logits(model: Any, model_type: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**forward_kwargs(model_type, prompt_ids(model_type, 12))).logits
    return found


def experts(model: Any) -> dict[str, TernaryExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TernaryExperts)}


def made(model_type: str, folder: Path, plan: TernaryPlan | None = None, **changes: Any) -> Path:
    ternarize(
        saved(model_type, folder / "src", **changes), folder / "out", plan=plan or TernaryPlan()
    )
    return folder / "out"


CASES = [
    *(("mixtral", plan) for plan in PLANS),
    *(("gpt_oss", plan) for plan in ("groups", "compact", "rotated")),
    ("jetmoe", "tensor"),
]


@pytest.mark.parametrize(("model_type", "plan"), CASES)
def test_experts_are_packed_and_compute_what_dense_ones_do(
    model_type: str, plan: str, tmp_path: Path
) -> None:
    out = made(model_type, tmp_path, PLANS[plan])
    model = load(out)
    held = experts(model)
    assert len(held) >= 2 * model.config.num_hidden_layers
    assert not any(
        p.ndim == 3 and p.dtype.itemsize > 1 and "scale" not in name and "offset" not in name
        for name, p in model.named_parameters()
    )
    assert not any(p.requires_grad for m in held.values() for p in m.packed.parts.values())
    first = logits(model, model_type)
    # Saved, the packed parts are those of the checkpoint, bit by bit.
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), model_type), first)
    if plan != "compact":
        once, twice = tensors(out), tensors(tmp_path / "again")
        assert once.keys() == {name for name, value in twice.items() if value.numel()}
        assert all(torch.equal(once[name], twice[name]) for name in once)
    # The same matrices in another order of sums.
    dense = copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, PackedModule) for module in dense.modules())
    assert_near(logits(dense, model_type), first, 1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert_near(logits(load(tmp_path / "dense"), model_type), first, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_every_implementation_of_transformers_reads_them(
    model_type: str, implementation: str, tmp_path: Path
) -> None:
    model = load(made(model_type, tmp_path))
    assert model.config._experts_implementation == "trilens"
    first = logits(model, model_type)
    model.set_experts_implementation(implementation)
    found = logits(model, model_type)
    assert_near(found, first, 1e-5)
    dense = model.dequantize()
    dense.set_experts_implementation(implementation)
    assert torch.equal(logits(dense, model_type), found)


def test_some_layers_dense_and_some_packed(tmp_path: Path) -> None:
    """One converter of transformers serves both; a half packed parameter is made dense."""
    plan = TernaryPlan(keep=(r"layers\.1\..*experts", r"layers\.2\..*w3"))
    out = made("mixtral", tmp_path, plan)
    model = load(out)
    assert not any(
        "layers.1." in name or "layers.2.mlp.experts.gate" in name for name in experts(model)
    )
    assert any("layers.0." in name for name in experts(model))
    first = logits(model, "mixtral")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), "mixtral"), first)
    assert_near(logits(model.dequantize(), "mixtral"), first, 1e-5)


def test_one_expert_kept_among_packed_ones_is_refused(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "src")
    with pytest.raises(UsageError, match="keep all of them or none"):
        ternarize(source, tmp_path / "out", plan=TernaryPlan(keep=(r"layers\.2\..*\.3\.w3",)))


def test_gradients_reach_the_inputs(tmp_path: Path) -> None:
    model = load(made("mixtral", tmp_path))
    model.requires_grad_(False)
    x = model.get_input_embeddings()(prompt_ids("mixtral", 6)).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    model.dequantize()(inputs_embeds=again).logits.square().sum().backward()
    assert_near(x.grad, again.grad, 1e-4)


def test_copies_pickles_and_casts(tmp_path: Path) -> None:
    model = load(made("gpt_oss", tmp_path), dtype=torch.bfloat16)
    first = logits(model, "gpt_oss")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, "gpt_oss"), first)
    held = next(iter(experts(model.to(torch.float32)).values()))
    assert held.codes.dtype == torch.uint8 and held.scale.dtype == torch.float32
    assert held.dtype == held[0].dtype == torch.float32
    assert held.shape == held.dense().shape
    assert torch.equal(held[torch.tensor([2, 0])], held.dense()[[2, 0]])


def test_experts_on_disk_compute_the_same(tmp_path: Path) -> None:
    out = made("mixtral", tmp_path)
    n_layers = load(out).config.num_hidden_layers
    placement: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    placement |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(n_layers)}
    offloaded = load(out, device_map=placement, offload_folder=tmp_path / "offload")
    assert list(experts(offloaded).values())[-1].codes.is_meta
    assert torch.equal(logits(offloaded, "mixtral"), logits(load(out), "mixtral"))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_lens_finds_what_it_finds_in_the_dense_model(model_type: str, tmp_path: Path) -> None:
    model = load(made(model_type, tmp_path)).eval()
    lens, dense = Lens(model), Lens(copy.deepcopy(model).dequantize())
    ids = prompt_ids(model_type, 12)
    ours, theirs = (one.capture(ids, residual="all", gates=True) for one in (lens, dense))
    assert ours.gates is not None and theirs.gates is not None
    assert lens.gate_layers == dense.gate_layers
    assert set(ours.gates) == set(theirs.gates) and len(ours.gates)
    for name, layer in ours.gates:
        assert_near(ours.gates.get(name, layer), theirs.gates.get(name, layer), 1e-5)
    mine, other = matrices_of(lens.model).found, matrices_of(dense.model).found
    assert {n: m.shape for n, m in mine.items()} == {n: m.shape for n, m in other.items()}
    for name, matrix in mine.items():
        assert torch.equal(matrix.read(), other[name].read())


def test_ablated_experts_and_edits_that_change_nothing(tmp_path: Path) -> None:
    model = load(made("mixtral", tmp_path)).eval()
    lens, dense = Lens(model), Lens(copy.deepcopy(model).dequantize())
    ids = prompt_ids("mixtral", 12)
    plain = lens.capture(ids, logits="all").logits
    same = lens.capture(ids, logits="all", edits=[Scale("router", 1.0)])
    assert torch.equal(same.logits, plain)
    ablated = Ablate("router", layer=1, units=[0, 2], method="zero")
    changed, theirs = (
        one.capture(ids, logits="all", edits=[ablated]).logits for one in (lens, dense)
    )
    assert not torch.equal(changed, plain)
    assert_near(changed, theirs, 1e-5)


def test_a_part_that_is_missing_or_illegal_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out = made("gpt_oss", tmp_path)
    values = tensors(out)
    name = "model.layers.1.mlp.experts.down_proj_codes"
    (out / "model.safetensors").unlink()
    save_file({**values, name: torch.full_like(values[name], 0xFF)}, out / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"layers\.1\.mlp\.experts\.down_proj.*code 3"):
        load(out)


def test_adapters_beside_packed_experts(tmp_path: Path) -> None:
    out = made("mixtral", tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["gate_up_proj"])
    with pytest.raises(UsageError, match="take no adapters"):
        peft.get_peft_model(load(out), trilens.enable_lora(config))
    with pytest.raises(UsageError, match="name the packed layers"):
        trilens.enable_lora(peft.LoraConfig(target_modules="all-linear"))
    target = "experts.gate_up_proj"
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[target])
    with pytest.raises(UsageError, match=r"pass the model too.*model=model"):
        trilens.enable_lora(config)
    dense = load(out)
    with pytest.raises(UsageError, match=r"layers\.0.*gate_up_proj.*model\.dequantize\(\) first"):
        trilens.enable_lora(config, model=dense)
    dense.dequantize()
    adapted = peft.get_peft_model(dense, trilens.enable_lora(config, model=dense))
    assert any("experts.lora_A" in name for name, _ in adapted.named_parameters())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load(out), trilens.enable_lora(config)).eval()
    first = logits(model, "mixtral")
    model(**forward_kwargs("mixtral", prompt_ids("mixtral", 12))).logits.square().mean().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    merged = model.merge_and_unload()
    assert experts(merged)
    assert_near(logits(merged, "mixtral"), first, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert experts(again)
    assert_near(logits(again, "mixtral"), first, 1e-5)
