"""Packed BitNet checkpoints as a source: trits and scales kept, whatever the scale is meant for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_cases import load
from gguf_cases import saved_with_tokenizer
from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import CorruptFileError, UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, for its own compiler
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, WeightQuant, pack_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of its own quantizer

CLASSES = ("autobitlinear", "bitlinear")
GATE = "model.layers.0.mlp.gate_proj.weight"


def packed(folder: Path, linear_class: str, model_type: str = "llama", **section: Any) -> Path:
    """A checkpoint whose matrices transformers' own code has packed."""
    saved_with_tokenizer(folder, model_type, tie_word_embeddings=False)
    stored: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = value.abs().mean().reshape(1)
            stored[name] = pack_weights((value / scale).round().clamp(-1, 1))
            by = scale if linear_class == "autobitlinear" else 1 / scale
            stored[f"{name}_scale"] = by.bfloat16().float()
        else:
            stored[name] = value
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    section = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
        **section,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
    return folder


@pytest.fixture(scope="module", params=CLASSES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("bitnet") / request.param, request.param)


def own_layer(folder: Path, name: str) -> Any:
    """transformers' layer with the stored tensors."""
    stored = load_file(folder / "model.safetensors")
    rows, cols = stored[name].shape
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    if settings["linear_class"] == "bitlinear":
        layer: Any = BitLinear(cols, 4 * rows, bias=False, dtype=torch.float32)
        layer.weight.copy_(stored[name])
    else:
        layer = AutoBitLinear(cols, 4 * rows, bias=False, dtype=torch.float32)
        low = torch.cat([(stored[name] >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)])
        layer.weight.data.copy_(low)
    layer.weight_scale.copy_(stored[f"{name}_scale"])
    return layer


def scale_of(folder: Path, name: str, linear_class: str) -> Tensor:
    scale = load_file(folder / "model.safetensors")[f"{name}_scale"]
    found: Tensor = scale if linear_class == "autobitlinear" else 1 / scale
    return found


@torch.no_grad()
def test_a_layer_computes_what_transformers_own_does(source: Path, tmp_path: Path) -> None:
    report = ternarize(source, tmp_path / "out")
    assert len(report.coded) == 7
    assert {tensor.outcome for tensor in report.coded} == {"already ternary"}
    assert {tensor.relative_error for tensor in report.coded} == {0.0}
    model = load(tmp_path / "out")
    torch.manual_seed(0)
    x = torch.randn(3, 256)
    scale = 127 / x.abs().amax(-1, keepdim=True)
    rounded = (x * scale).round() / scale  # to 8 bits, as BitNet's layers do and ours do not
    for tensor in report.coded:
        layer = model.get_submodule(tensor.name.removesuffix(".weight"))
        with torch.compiler.set_stance("force_eager"):
            expected = own_layer(source, tensor.name)(x)
        assert float((layer(rounded) - expected).norm() / expected.norm()) < 1e-6
        assert 1e-4 < float((layer(x) - expected).norm() / expected.norm()) < 0.05


def test_trits_and_scales_are_the_sources(source: Path, tmp_path: Path) -> None:
    ternarize(source, tmp_path / "out", plan=TernaryPlan(storage="compact"))
    validate(tmp_path / "out")
    report = ternarize(tmp_path / "out", tmp_path / "dense", format="dense")
    assert "8 bits" in report.verdict
    dense = load_file(tmp_path / "dense/model.safetensors")
    stored = load_file(source / "model.safetensors")
    assert set(dense) == {name for name in stored if not name.endswith("_scale")}
    for name, codes in stored.items():
        if codes.dtype != torch.uint8:
            assert name.endswith("_scale") or torch.equal(dense[name], codes)
            continue
        trits = torch.cat([(codes >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)])
        assert torch.equal(dense[name], trits * scale_of(source, name, source.name))
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in config


def test_report_card_and_manifest_say_what_differs(source: Path, tmp_path: Path) -> None:
    report = ternarize(source, tmp_path / "out")
    assert "rounds the input of each ternary layer to 8 bits" in report.verdict
    assert "computes what it computed before" not in report.verdict
    assert report.verdict in (tmp_path / "out/README.md").read_text()
    assert validate(tmp_path / "out").note == report.note


@pytest.mark.parametrize("way", ["straight", "by way of a ternary checkpoint"])
def test_a_gguf_file_holds_the_same_trits(source: Path, tmp_path: Path, way: str) -> None:
    start = source
    if way != "straight":
        start = tmp_path / "out"
        ternarize(source, start)
    report = ternarize(start, tmp_path / "m.gguf", format="gguf-tq2_0")
    assert "8 bits" in report.verdict
    (gate,) = [
        t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_gate.weight"
    ]
    found = torch.from_numpy(dequantize(gate.data, gate.tensor_type))
    codes = load_file(source / "model.safetensors")[GATE]
    trits = torch.cat([(codes >> shift & 3).float() - 1 for shift in (0, 2, 4, 6)])
    assert torch.equal(found, trits * scale_of(source, GATE, source.name).half().float())


def test_bitnets_own_architecture(tmp_path: Path) -> None:
    source = packed(tmp_path / "src", "autobitlinear", "bitnet")
    report = ternarize(source, tmp_path / "out")
    assert {tensor.outcome for tensor in report.coded} == {"already ternary"}
    dry = ternarize(source, tmp_path / "none", dry_run=True)
    assert [t.size_bytes for t in dry.tensors] == [t.size_bytes for t in report.tensors]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"linear_class": "bitlinear_v2"}, "linear_class 'bitlinear_v2'"),
        ({"linear_class": ["bitlinear"]}, r"linear_class \['bitlinear'\]"),
        ({"quantization_mode": "mixed"}, "quantization_mode 'mixed'"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_another_variant_is_refused_by_name(
    section: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = packed(tmp_path / "src", **{"linear_class": "autobitlinear", **section})
    with pytest.raises(UsageError, match=said):
        ternarize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda s: s.update({GATE: s[GATE].float()}), UsageError, "as F32 beside"),
        (
            lambda s: s.update({f"{GATE}_scale": torch.ones(256, 1)}),
            UsageError,
            r"\[256, 1\]: one floating-point number",
        ),
        (
            lambda s: s.update({GATE.replace("weight", "bias"): torch.ones(256)}),
            UsageError,
            f"a bias beside {GATE}: transformers multiplies such a bias by the scale",
        ),
        (lambda s: s.pop(f"{GATE}_scale"), CorruptFileError, "no scale for them"),
        (lambda s: s.pop(GATE), CorruptFileError, f"no {GATE}"),
        (lambda s: s.update({GATE: s[GATE] | 3}), CorruptFileError, "code 3"),
        (lambda s: s.update({f"{GATE}_scale": torch.zeros(1)}), CorruptFileError, "other than 0"),
        (lambda s: s.update({GATE: s[GATE][:8].clone()}), CorruptFileError, "gate_proj"),
        (
            lambda s: s.update(
                {
                    "lm_head.weight": torch.cat([s[GATE], s[GATE][:16]]),
                    "lm_head.weight_scale": torch.ones(1),
                }
            ),
            UsageError,
            "lm_head.weight packed, where trilens keeps weights as they are",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], Any], error: type, said: str, tmp_path: Path
) -> None:
    source = rewrite(packed(tmp_path / "src", "autobitlinear"), change)
    with pytest.raises(error, match=said):
        ternarize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_plan_or_a_calibration_for_trits_that_are_there_is_refused(
    source: Path, tmp_path: Path
) -> None:
    for plan in (TernaryPlan("exact"), TernaryPlan(keep=("gate",)), TernaryPlan(per="row")):
        with pytest.raises(UsageError, match="ternary already, and its trits are kept"):
            ternarize(source, tmp_path / "out", plan=plan)
    with pytest.raises(UsageError, match="leave the calibration out"):
        ternarize(source, tmp_path / "out", calibration=Calibration(("some text " * 999,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_online_checkpoint_becomes_what_its_layers_compute_with(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its weights are plain, and transformers' layer makes trits of them at every call."""
    source = saved_with_tokenizer(tmp_path / "src", "llama", tie_word_embeddings=False)
    stored = load_file(source / "model.safetensors")
    stored = {name: value.to(dtype) for name, value in stored.items()}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    section = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    path = source / "config.json"
    settings = {**json.loads(path.read_text()), "quantization_config": section}
    section["quant_method"] = "bitnet"
    path.write_text(json.dumps(settings))
    report = ternarize(source, tmp_path / "out")
    assert len(report.coded) == 7 and {tensor.outcome for tensor in report.coded} == {"ternary"}
    assert "other values" not in report.note
    for plan, n_lost in (
        (TernaryPlan("exact"), 7),
        (TernaryPlan(per="row"), 7),
        (TernaryPlan(rotate=True), 7),
        (TernaryPlan(keep=("gate",)), 1),
        (TernaryPlan(matrices={GATE: MatrixPlan("twn")}), 1),
    ):
        lossy = ternarize(source, tmp_path / "lossy", plan=plan, dry_run=True)
        assert f"gives {n_lost} of its matrices other values" in lossy.note
        assert lossy.note in lossy.verdict
    model = load(tmp_path / "out", dtype=torch.float32)
    ternarize(source, tmp_path / "m.gguf", format="gguf-tq2_0")
    in_file = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    for tensor in report.coded:
        own = _online(stored[tensor.name].float())
        ours = model.get_submodule(tensor.name.removesuffix(".weight")).weight
        assert torch.equal(ours.sign(), own.sign())
        # Its scale is 1 / (1 / mean), rounded twice.
        assert float((ours - own).abs().max()) <= 2**-22 * float(own.abs().max())
    gate = in_file["blk.0.ffn_gate.weight"]
    found = torch.from_numpy(dequantize(gate.data, gate.tensor_type))
    own = _online(stored[GATE].float())
    assert torch.equal(found.sign(), own.sign())
    assert float((found - own).abs().max()) <= 2**-11 * float(own.abs().max())  # a float16 scale


def _online(weight: Tensor) -> Tensor:
    """As `transformers.integrations.bitnet.WeightQuant`, without its compiler."""
    with torch.compiler.set_stance("force_eager"):
        return WeightQuant.apply(weight)
