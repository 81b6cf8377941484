"""What layers multiply by, also where a quantizer, an adapter or a disk stands between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from foreign_cases import EightBit, FourBit, Scaled, eight_bit
from tinymodels import build, prompt_ids
from tolerances import assert_close_sums
from trilens import Lens, compare, ternarize
from trilens.errors import CaptureError, UsageError
from trilens.planning.matrices import find_matrices
from trilens.taps.matrices import matrices_of
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant

GATE = "model.layers.0.mlp.gate_proj.weight"


def rows(before: Any, after: Any) -> tuple[dict[str, float], tuple[str, ...]]:
    result = compare(before, after, [prompt_ids("llama", 9)[0]])
    found = result.select("weight_relative_error")
    return {f"{row.layer}.{row.module}": row.after for row in found}, result.notes


def relative_error(weight: Tensor, other: Tensor) -> float:
    gap = (weight - other).double().square().sum() / weight.double().square().sum()
    return float(gap.detach())


def pack(trits: Tensor) -> Tensor:
    """Four rows' codes in a byte, as transformers' BitNet layers store them."""
    quarters = (trits + 1).to(torch.uint8).reshape(4, -1, trits.shape[1])
    return sum(
        (quarter << 2 * i for i, quarter in enumerate(quarters)), torch.zeros_like(quarters[0])
    )


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BitNet model with dense weights, packed by transformers, and quantized as it runs."""
    root = tmp_path_factory.mktemp("bitnet")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bitnet", vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    folders = {name: root / name for name in ("dense", "offline", "online")}
    model.save_pretrained(folders["dense"])
    stored: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("proj.weight"):
            scale = value.abs().mean()
            stored[name] = pack((value / scale).round().clamp(-1, 1))
            stored[f"{name[:-6]}weight_scale"] = scale.reshape(1)
        else:
            stored[name] = value.contiguous()
    settings = json.loads((folders["dense"] / "config.json").read_text())
    for mode in ("offline", "online"):
        shutil.copytree(folders["dense"], folders[mode])
        settings["quantization_config"] = {
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode,
            "modules_to_not_convert": ["lm_head"],
        }  # fmt: skip
        (folders[mode] / "config.json").write_text(json.dumps(settings))
    save_file(stored, folders["offline"] / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.mark.filterwarnings("ignore")  # what transformers says of its own quantizer
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_bitnet_layers_multiply_by_trits_times_scale(bitnet: dict[str, Path], mode: str) -> None:
    before = Lens.from_pretrained(bitnet["dense"])
    found, notes = rows(before, Lens.from_pretrained(bitnet[mode]))
    assert notes == ()
    assert len(found) == 14
    weight = before.model.get_parameter(GATE)
    scale = weight.abs().mean()
    expected = relative_error(weight, (weight / scale).round().clamp(-1, 1) * scale)
    assert found["0.mlp.gate_proj.weight"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_plain_weights_of_an_online_bitnet_become_the_trits_that_it_used(
    bitnet: dict[str, Path], tmp_path: Path
) -> None:
    ternarize(bitnet["online"], tmp_path / "out")
    found, _ = rows(Lens.from_pretrained(bitnet["online"]), Lens.from_pretrained(tmp_path / "out"))
    assert len(found) == 14
    assert max(found.values()) < 1e-12


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, for transformers
def test_factors_of_an_adapter_are_added_to_the_weight() -> None:
    before = Lens(build("llama"))
    adapted = peft.get_peft_model(
        build("llama"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM"),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    model = adapted.get_base_model()
    found, notes = rows(before, Lens(model))
    assert notes == ()
    names = ("self_attn.q_proj.weight", "mlp.gate_proj.weight")
    assert set(found) == {f"{i}.{name}" for i in range(before.n_layers) for name in names}
    merged = adapted.merge_and_unload().get_parameter(GATE)
    expected = relative_error(before.model.get_parameter(GATE), merged)
    assert found["0.mlp.gate_proj.weight"] == pytest.approx(expected, rel=1e-4)


def test_offloaded_weights_are_read_through_their_hook_and_left_where_they_were() -> None:
    before, model = Lens(build("llama")), build("llama", seed=1)
    plain, _ = rows(before, Lens(model))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_parameter(GATE).is_meta
    found, notes = rows(before, Lens(model))
    assert (found, notes) == (plain, ())
    assert model.get_parameter(GATE).is_meta


def test_a_quantized_tensor_is_asked_for_its_values() -> None:
    before, model = Lens(build("llama")), build("llama")
    layer = model.model.layers[0].mlp.gate_proj
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(eight_bit(weight), requires_grad=False)
    assert isinstance(layer.weight, EightBit)
    found, notes = rows(before, Lens(model))
    assert notes == ()
    assert list(found) == ["0.mlp.gate_proj.weight"]
    expected = relative_error(weight, eight_bit(weight).dequantize())
    assert found["0.mlp.gate_proj.weight"] == pytest.approx(expected, rel=1e-6)


def test_packed_codes_under_the_name_of_a_weight_are_not_the_weight() -> None:
    before, model = Lens(build("llama")), build("llama")
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = FourBit(mlp.gate_proj)
    found, notes = rows(before, Lens(model))
    assert notes == ()
    assert list(found) == ["0.mlp.gate_proj.weight"]
    expected = relative_error(before.model.get_parameter(GATE), mlp.gate_proj.dense())
    assert found["0.mlp.gate_proj.weight"] == pytest.approx(expected, rel=1e-5)


def test_the_weights_of_a_layer_that_takes_no_plain_input_are_left_out_with_its_error() -> None:
    with pytest.raises(CaptureError, match=r"0\.weight: a Mute does not answer .*no kernel here"):
        matrices_of(nn.Sequential(Mute(4, 4))).found["0.weight"].read()


class Mute(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel here")


def test_a_layer_that_scales_its_output_is_measured_and_one_that_does_not_is_believed() -> None:
    layer = Scaled(6, 10, factor=1.0)
    matrix = matrices_of(nn.Sequential(layer)).found["0.weight"]
    assert matrix.read().data_ptr() == layer.weight.data_ptr()
    layer.factor = 3.0
    assert matrix.shape == (10, 6)
    terms = 3 * layer.weight.abs() + 6 * layer.bias.abs().max()
    assert_close_sums(matrix.read(), 3 * layer.weight, terms, 8, torch.float32)


def test_what_wraps_a_layer_counts() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(6, 10), "b": nn.Linear(6, 10), "c": nn.Linear(6, 10)})
    expected = layers["a"].weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layers["a"], "weight", Doubled())
    layers["b"].forward = lambda x: nn.functional.linear(x, 2 * layers["b"].weight)
    layers["c"] = torch.compile(layers["c"], backend="eager")
    held = matrices_of(layers)
    assert set(held.found) == {"a.weight", "b.weight", "c.weight"}
    bound = 2 * expected.abs() + layers["a"].bias.abs().max()
    assert_close_sums(held.found["a.weight"].read(), 2 * expected, bound, 8, torch.float32)
    b = layers["b"].weight
    assert_close_sums(held.found["b.weight"].read(), 2 * b, 2 * b.abs(), 8, torch.float32)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Foreign(nn.Module):
    """A layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


@pytest.mark.parametrize("kind", ["llama4_text", "deepseek_v4"])
def test_layers_of_the_models_own_code_keep_their_weights(kind: str) -> None:
    model = build(kind)
    held = matrices_of(model)
    assert not held.left_out
    assert set(held.found) == {name for name, p in model.named_parameters() if p.dim() >= 2}
    for name, matrix in held.found.items():
        assert torch.equal(matrix.read(), model.get_parameter(name))


def test_what_cannot_be_known_is_left_out_with_the_reason() -> None:
    float8 = nn.Embedding(4, 4)
    float8.weight = nn.Parameter(float8.weight.detach().to(torch.float8_e4m3fn), False)
    parts = {"foreign": Foreign(), "float8": float8, "away": nn.Linear(4, 4, device="meta")}
    held = matrices_of(nn.ModuleDict({**parts, "bent": Rectified(4, 4)}))
    assert set(held.found) == {"bent.weight"}
    for name, word in (("foreign", "Foreign"), ("float8", "float8_e4m3fn"), ("away", "meta")):
        assert word in held.left_out[f"{name}.weight"]
    with pytest.raises(CaptureError, match="Rectified is not linear"):
        held.found["bent.weight"].read()


def test_compare_names_what_it_left_out() -> None:
    after = build("llama")
    layer = after.model.layers[1].mlp.up_proj
    bent = Rectified(layer.in_features, layer.out_features, bias=False)
    after.model.layers[1].mlp.up_proj = bent
    after.model.layers[0].extra = nn.Linear(3, 3)
    found, notes = rows(Lens(build("llama")), Lens(after))
    assert not found
    assert any("layers.0.extra.weight: only the model after" in note for note in notes)
    assert any("layers.1.mlp.up_proj.weight: a Rectified is not linear" in note for note in notes)


def test_linear_layers_have_one_orientation_and_tied_ones_one_name() -> None:
    model = build("gpt2")
    held = matrices_of(model)
    path = "transformer.h.0.mlp.c_fc"
    weight = model.get_submodule(path).weight
    matrix = held.found[f"{path}.weight"]
    assert matrix.shape == tuple(weight.shape)[::-1] == tuple(matrix.read().shape)
    assert held.aliases == {"lm_head.weight": "transformer.wte.weight"}
    quant = PerLayerQuant.quantize(weight.detach().T.numpy(), "fc", rule="absmean")
    packed = TernaryLinear.from_quant(quant, model.get_submodule(path).bias, transposed=True)
    model.transformer.h[0].mlp.c_fc = packed
    matrix = matrices_of(model).found[f"{path}.weight"]
    assert torch.equal(matrix.read(), torch.as_tensor(quant.reconstruct()))
    assert matrix.shape == quant.shape


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, for transformers
def test_a_plan_wants_weights_that_can_be_replaced() -> None:
    model = build("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(eight_bit(layer.weight.detach()), requires_grad=False)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight .*EightBit"):
        find_matrices(Lens(model))
    adapted = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(UsageError, match=r"q_proj\.base_layer\.weight .*merge"):
        find_matrices(Lens(adapted.get_base_model().eval()))
