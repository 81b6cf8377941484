"""transformers and the lens open a ternary checkpoint as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from checkpoint_cases import load, saved, tensors
from tinymodels import forward_kwargs, prompt_ids
from tolerances import assert_near
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.integration import TrilensConfig, TrilensQuantizer
from trilens.checkpoint.pipeline import ternarize
from trilens.errors import ConfigError, CorruptFileError
from trilens.lens.lens import Lens
from trilens.ternary.packed.linear import TernaryLinear

TYPES = ["llama", "gpt2", "mixtral", "gpt_oss", "granitemoe", "jetmoe", "mamba", "falcon"]
PLANS = {"absmean": TernaryPlan(), "planes": TernaryPlan("planes", group_size=24)}


def logits(model, model_type: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**forward_kwargs(model_type, prompt_ids(model_type, 12))).logits


def layers(model) -> dict[str, TernaryLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TernaryLinear)}


def test_the_method_is_registered() -> None:
    assert AUTO_QUANTIZER_MAPPING["trilens"] is TrilensQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["trilens"] is TrilensConfig


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model_type", TYPES)
def test_load_save_and_load_again(model_type: str, plan: str, tmp_path: Path) -> None:
    source = saved(model_type, tmp_path / "src")
    report = ternarize(source, tmp_path / "out", plan=PLANS[plan])
    model = load(tmp_path / "out")
    packed = [t for t in report.coded if not t.reason]
    assert len(layers(model)) == len(packed)
    assert not any(p.requires_grad for m in layers(model).values() for p in m.packed.parts.values())
    first = logits(model, model_type)
    assert not torch.equal(first, logits(load(source), model_type))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), model_type), first)
    once, twice = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    for tensor in packed:
        name = tensor.name.removesuffix(".weight") + ".codes"
        assert torch.equal(once[name], twice[name])
    # A dense model from the same weights, which transformers saves and loads by itself.
    model.dequantize()
    assert not layers(model)
    # The same operations but for Conv1D and experts: other products, which sum in another order.
    close = 1e-5 if model_type in {"gpt2", "gpt_oss", "mixtral", "granitemoe"} else 0.0
    assert_near(logits(model, model_type), first, close)
    model.save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    if model_type != "granitemoe":  # its experts were stored under the model's own names
        assert set(tensors(tmp_path / "dense")) == set(tensors(source))
    assert_near(logits(dense, model_type), first, close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_activations(dtype: torch.dtype, tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out", plan=TernaryPlan(per="row"))
    model = load(tmp_path / "out", dtype=dtype)
    assert model.dtype == dtype
    stored = tensors(tmp_path / "out")
    for name, layer in layers(model).items():
        assert torch.equal(layer.scale, stored[f"{name}.scale"])
        assert layer.scale.dtype == torch.float32
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, layer.reconstruct().to(dtype))
    whole = logits(load(tmp_path / "out"), "llama")
    half = logits(model, "llama")
    assert half.dtype == dtype
    # The same weights in fewer digits: a few per cent of the logits' size.
    assert float((half.float() - whole).abs().max()) < 0.1 * float(whole.abs().max())


def test_bare_model_and_device(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    full, bare = load(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out")
    assert len(layers(bare)) == len(layers(full))
    ids = prompt_ids("llama", 9)
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, full.model(ids).last_hidden_state)
    moved = full.to("cpu", torch.bfloat16)
    assert all(layer.scale.dtype == torch.float32 for layer in layers(moved).values())


def test_gradients_reach_the_embeddings(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    model = load(tmp_path / "out")
    embeddings = model.get_input_embeddings()(prompt_ids("llama", 6)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().sum().backward()
    ours = embeddings.grad
    model.zero_grad()
    again = embeddings.detach().clone().requires_grad_()
    model.dequantize()(inputs_embeds=again).logits.square().sum().backward()
    # The same products; sums over the batch in another order.
    assert_near(ours, again.grad, 1e-4)


def test_dequantized_layers_have_their_old_classes(tmp_path: Path) -> None:
    for model_type, kind in (("llama", nn.Linear), ("gpt2", Conv1D)):
        ternarize(saved(model_type, tmp_path / model_type), tmp_path / f"{model_type} out")
        model = load(tmp_path / f"{model_type} out")
        names = list(layers(model))
        model.dequantize()
        assert {type(model.get_submodule(name)) for name in names} == {kind}
        assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_the_lens_sees_the_dequantized_model(model_type: str, tmp_path: Path) -> None:
    source = saved(model_type, tmp_path / "src")
    (source / "tokenizer_config.json").unlink()
    ternarize(source, tmp_path / "out", plan=TernaryPlan("exact", group_size=32))
    lens = Lens.from_pretrained(str(tmp_path / "out"), device_map="cpu")
    assert layers(lens.model)
    dense = Lens(load(tmp_path / "out").dequantize())
    assert lens.gate_layers == dense.gate_layers
    assert lens.attention_layers == dense.attention_layers
    gated = bool(lens.gate_layers)
    assert gated == (model_type != "gpt2")
    ids = prompt_ids(model_type, 16)
    ours, theirs = (
        one.capture(ids, residual="all", attention=True, gates=gated) for one in (lens, dense)
    )
    # float32, four layers: addmm and linear sum Conv1D's products in another order.
    for layer in range(lens.n_layers):
        assert_near(ours.residual.get_layer(layer), theirs.residual.get_layer(layer), 2e-5)
        for position in (0, 15):
            assert_near(
                ours.attention.attention_from_position(layer, position),
                theirs.attention.attention_from_position(layer, position),
                2e-5,
                least=1.0,
            )
        if gated:
            gates = (one.gates.get("mlp.gate", layer) for one in (ours, theirs))
            assert_near(*gates, 2e-5)


def patched(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    return folder


def test_versions_and_options_it_does_not_know(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    with pytest.raises(ConfigError, match="option 'colour'"):
        load(patched(tmp_path / "out", colour="red"))
    with pytest.raises(ConfigError, match="format version 2"):
        load(patched(tmp_path / "out", format_version=2))
    section = AutoConfig.from_pretrained(tmp_path / "src").to_dict().get("quantization_config")
    assert section is None


def test_a_code_3_is_refused_when_loaded(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin = header["model.layers.2.mlp.up_proj.codes"]["data_offsets"][0]
    raw[8 + length + begin + 7] = 0xFF
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"layers\.2\.mlp\.up_proj"):
        load(tmp_path / "out")
