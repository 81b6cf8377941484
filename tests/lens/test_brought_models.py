"""Models as people bring them: adapters switched off, half precision, on disk, quantized, GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import trilens
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens import Lens, demo_path
from trilens.errors import ConfigError, CorruptFileError, ModelNotFoundError, UsageError

pytestmark = pytest.mark.usefixtures("quiet")

IDS = prompt_ids("llama", 9)[0]


def adapted(model: Any) -> Any:
    """With an adapter that changes what the model says: LoRA begins as no change."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    found = peft.get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return found.eval()


def test_a_capture_is_of_the_adapters_that_are_active() -> None:
    expected = Lens(build("llama")).capture(IDS, residual="all", attention=True)
    model = adapted(build("llama"))
    lens = Lens(model)
    with torch.no_grad():
        plain = model(IDS[None], use_cache=False).logits[0]
    on = lens.capture(IDS, residual="all", attention=True)
    assert torch.equal(on.logits, plain)
    assert not torch.allclose(on.logits, expected.logits)
    with model.disable_adapter():
        off = lens.capture(IDS, residual="all", attention=True)
    assert torch.equal(off.logits, expected.logits)
    assert torch.equal(off.attention.get_layer(1), expected.attention.get_layer(1))
    assert torch.equal(lens.capture(IDS).logits, plain)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    assert torch.equal(lens.capture(IDS).logits, expected.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_captured_bit_for_bit(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    with torch.no_grad():
        plain = model(IDS[None], use_cache=False).logits[0]
    found = Lens(model).capture(IDS, residual="all", attention=True, gates=True)
    assert torch.equal(found.logits, plain)
    assert found.residual[0].dtype == dtype


def test_training_mode_and_gradient_checkpointing_are_put_back() -> None:
    expected = Lens(build("llama")).capture(IDS, residual="all")
    model = build("llama")
    model.config.attention_dropout = 0.5
    model.gradient_checkpointing_enable()
    model.train()
    lens = Lens(model)
    assert model.training
    found = lens.capture(IDS, residual="all", attention=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.residual[2], expected.residual[2])
    gradients = lens.gradients(IDS, lambda logits: logits[-1, 5], layers=[0])
    assert float(gradients.gradients["resid_post", 0].abs().max()) > 0
    assert model.training
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_come_from_memory_or_disk(where: str, tmp_path: Path) -> None:
    expected = Lens(build("llama")).capture(IDS, residual="all", attention=True, gates=True)
    model = build("llama")
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    lens = Lens(model)
    found = lens.capture(IDS, residual="all", attention=True, gates=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(lens.unembed(found.residual[3]), expected.logits)
    made = lens.generate(IDS, max_new_tokens=3)
    assert (
        made.token_ids.tolist()
        == Lens(build("llama")).generate(IDS, max_new_tokens=3).token_ids.tolist()
    )


def test_a_generation_config_changes_neither_captures_nor_generation() -> None:
    model = build("llama")
    expected = Lens(model).generate(IDS, max_new_tokens=4).token_ids.tolist()
    plain = Lens(model).capture(IDS).logits
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=1, num_beams=2,
        output_attentions=False, cache_implementation="static", forced_bos_token_id=7,
    )  # fmt: skip
    held = model.generation_config
    lens = Lens(model)
    assert lens.generate(IDS, max_new_tokens=4).token_ids.tolist() == expected
    assert torch.equal(lens.capture(IDS).logits, plain)
    assert model.generation_config is held


class Embedder(nn.Sequential):
    """As sentence-transformers builds its models: the model in the first part, pooling after it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        first = nn.Module()
        first.model = model
        super().__init__(first, nn.Identity())
        self.tokenizer = tokenizer


def test_a_model_that_embeds_sentences_is_captured_as_the_model_inside() -> None:
    folder = demo_path("transformer")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lens = Lens(Embedder(model, tokenizer))  # type: ignore[arg-type]
    assert lens.model is model
    assert lens.capture("x = 1").tokens == Lens(model, tokenizer).capture("x = 1").tokens
    with pytest.raises(UsageError, match="a loaded transformers model is needed"):
        Lens(nn.Sequential(nn.Linear(3, 3)))  # type: ignore[arg-type]


def quantized(folder: Path, section: dict[str, Any]) -> Path:
    """The demo's files with a section that says they are quantized."""
    shutil.copytree(demo_path("transformer"), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


REFUSED: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
    "bitsandbytes": {"load_in_4bit": True},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "fbgemm_fp8": {},
    "quanto": {"weights": "int8"},
}


@pytest.mark.parametrize("method", REFUSED)
def test_a_quantization_that_is_not_read_is_refused_before_weights_are(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(trilens_weights(), "safe_open", read)
    folder = quantized(tmp_path / "q", {"quant_method": method, **REFUSED[method]})
    with pytest.raises(
        ConfigError, match=rf"quantized \(quant_method '{method}\w*'\).*install"
    ) as e:
        Lens.from_pretrained(folder)
    assert "\n" not in str(e.value)


def trilens_weights() -> Any:
    """Where transformers opens the files of weights."""
    import transformers.modeling_utils

    return transformers.modeling_utils


def test_a_checkpoint_in_fp8_is_captured_as_its_weights_are_decoded(tmp_path: Path) -> None:
    folder = quantized(
        tmp_path / "q",
        {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"},
    )
    file = folder / "model.safetensors"
    coded: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        coded[name] = decoded[name] = weight
        if name.endswith("proj.weight"):
            rows, cols = weight.shape
            blocks = weight.float().reshape(rows // 64, 64, cols // 64, 64)
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            coded[name] = codes.reshape(rows, cols)
            coded[f"{name}_scale_inv"] = scale
            plain = codes.float() * scale[:, None, :, None]
            decoded[name] = plain.reshape(rows, cols).to(torch.bfloat16)
    save_file(coded, file, metadata={"format": "pt"})
    plain_folder = quantized(tmp_path / "plain", {})
    settings = json.loads((plain_folder / "config.json").read_text())
    del settings["quantization_config"]
    (plain_folder / "config.json").write_text(json.dumps(settings))
    save_file(decoded, plain_folder / "model.safetensors", metadata={"format": "pt"})
    found = Lens.from_pretrained(folder).capture("def area(r):", attention=True)
    expected = Lens.from_pretrained(plain_folder).capture("def area(r):", attention=True)
    assert torch.equal(found.logits, expected.logits)


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    trilens.ternarize(demo_path("transformer"), tmp_path / "m.gguf", format="gguf-tq2_0")
    trilens.ternarize(demo_path("transformer"), tmp_path / "t")
    lens = Lens.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "def area(r):"
    found = lens.capture(text, residual="all", attention=True, gates=True)
    expected = Lens.from_pretrained(tmp_path / "t", dtype="float32").capture(text, residual="all")
    assert found.tokens == expected.tokens
    assert_near(found.residual[0], expected.residual[0], 1e-3)
    assert_near(found.logits, expected.logits, 1e-2)
    with pytest.raises(UsageError, match="is not the name of a file"):
        Lens.from_pretrained(tmp_path, gguf_file="../m.gguf")
    with pytest.raises(UsageError, match="needs a local directory"):
        Lens.from_pretrained("owner/name", gguf_file="m.gguf")
    with pytest.raises(ModelNotFoundError, match=r"no file other\.gguf"):
        Lens.from_pretrained(tmp_path, gguf_file="other.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[:5000])
    with pytest.raises(CorruptFileError, match="no whole GGUF file"):
        Lens.from_pretrained(tmp_path, gguf_file="half.gguf")
