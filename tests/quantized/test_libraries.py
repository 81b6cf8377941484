"""Models that real libraries quantized: saved and opened again, or as they stand in memory.

`make test-quantized` runs these in an environment that has the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

from tinymodels import prompt_ids, tiny_config
from tolerances import assert_near, roundings
from trilens import Lens

pytestmark = pytest.mark.filterwarnings("default")

IDS = prompt_ids("llama", 12)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 whose widths are whole blocks for every library."""
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size = 128, 256
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 4, 32
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def by_transformers(section: Any) -> Callable[[Path, Path], None]:
    def make(dense: Path, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=section())
        model.save_pretrained(folder)

    return make


def torchao_section() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def by_compressed_tensors(form: str, **how: Any) -> Callable[[Path, Path], None]:
    """Round to nearest with scales of the largest weight, as the library's own format stores it."""

    def make(dense: Path, folder: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )

        model = AutoModelForCausalLM.from_pretrained(dense)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**how))
        config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=form)
        apply_quantization_config(model, config)
        top = 448 if how["type"] == "float" else 2 ** (how["num_bits"] - 1) - 1
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                width = how.get("group_size", module.weight.shape[1])
                rows = module.weight.detach().unflatten(-1, (-1, width))
                module.weight_scale.data.copy_(rows.abs().amax(-1) / top)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return make


CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "torchao int8": (by_transformers(torchao_section), "Int8Tensor"),
    "bitsandbytes int8": (
        by_transformers(lambda: BitsAndBytesConfig(load_in_8bit=True)), "Int8Params",
    ),
    "bitsandbytes nf4": (
        by_transformers(
            lambda: BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        ),
        "Params4bit",
    ),
    "compressed-tensors int8": (
        by_compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel"),
        "Parameter",
    ),
    "compressed-tensors int4, packed": (
        by_compressed_tensors(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32
        ),
        "Parameter",
    ),
    "compressed-tensors fp8": (
        by_compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
        "Parameter",
    ),
}  # fmt: skip


@torch.no_grad()
def hooked(model: PreTrainedModel) -> tuple[Tensor, list[Tensor]]:
    """Logits and what each block returns, by plain hooks."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in model.model.layers
    ]
    logits = model(IDS, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, [each.reshape(IDS.shape[1], -1) for each in seen]


def assert_captured(lens: Lens) -> None:
    """Residuals bit for bit, attention as eager gives it, gates and heads."""
    model = lens.model
    logits, seen = hooked(model)
    heads = "attn.head_out" in lens.site_layers
    # A product that rounds its input gives no sum over heads: refused by name.
    assert heads or "do not sum to its output" in lens.why_no_site("attn.head_out", 0)
    sites = ["attn.head_out", "attn.out"][not heads :]
    cap = lens.capture(IDS[0], residual="all", attention=True, gates=True, sites=sites)
    assert torch.equal(cap.logits, logits)
    for layer, rows in enumerate(seen):
        assert torch.equal(cap.residual[layer], rows)
        out = cap.sites["attn.out", layer]
        if heads:
            assert_near(cap.sites["attn.head_out", layer].sum(1), out, 1e-4)
    assert cap.gates.names == ("mlp.gate",)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(IDS, use_cache=False, output_attentions=True).attentions
    for layer, theirs in enumerate(weights):
        assert_near(cap.attention.get_layer(layer), theirs, roundings(256))
    again, _ = hooked(model)
    assert_near(again, logits, 1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_quantized_checkpoint_is_captured(name: str, dense: Path, tmp_path: Path) -> None:
    make, kind = CHECKPOINTS[name]
    make(dense, tmp_path)
    lens = Lens.from_pretrained(tmp_path)
    weight = lens.model.model.layers[1].mlp.up_proj.weight
    assert type(weight).__name__ == kind
    assert_captured(lens)
    plain = Lens.from_pretrained(dense).capture(IDS[0]).logits
    found = lens.capture(IDS[0]).logits
    assert not torch.equal(found, plain)
    assert float((found - plain).norm() / plain.norm()) < 0.5


def test_quanto_quantizes_in_memory(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=QuantoConfig(weights="int8")
    )
    assert type(model.model.layers[1].mlp.up_proj).__name__ == "QLinear"
    assert_captured(Lens(model.eval()))


def test_hqq_quantizes_in_memory(dense: Path) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    made = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
                    setattr(parent, name, made)
    assert_captured(Lens(model))
