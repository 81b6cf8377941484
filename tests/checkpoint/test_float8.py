"""Float8 checkpoints as a source: what they stand for is what is ternarized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_cases import saved
from gguf_cases import saved_with_tokenizer
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.gguf.reader import read_gguf
from trilens.checkpoint.pipeline import ternarize
from trilens.errors import CorruptFileError, UsageError

PLAN = TernaryPlan("exact", per="row")
UP = "model.layers.0.mlp.up_proj.weight"


def in_float8(value: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the weights that they stand for."""
    rows, cols = value.shape
    n_rows, n_cols = -(-rows // block[0]), -(-cols // block[1])
    scale = torch.empty(n_rows, n_cols)
    codes = torch.empty_like(value).to(torch.float8_e4m3fn)
    dense = torch.empty_like(value)
    for i in range(n_rows):
        for j in range(n_cols):
            at = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale[i, j] = value[at].abs().max() / 448
            codes[at] = (value[at] / scale[i, j]).to(torch.float8_e4m3fn)
            dense[at] = codes[at].float() * scale[i, j]
    return codes, scale, dense


def quantized(
    folder: Path, method: str, block: tuple[int, int] | None, **changes: Any
) -> tuple[Path, Path]:
    """A float8 checkpoint, and the same weights in float32."""
    source = saved_with_tokenizer(folder / "float8", tie_word_embeddings=False)
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    suffix = "_scale_inv" if method == "fp8" else "_scale"
    for name, value in load_file(source / "model.safetensors").items():
        stored[name] = dense[name] = value
        if name.endswith("proj.weight"):
            own = block or (1, value.shape[1])
            codes, scale, dense[name] = in_float8(value, own)
            stored |= {name: codes, name + suffix: scale}
    section: dict[str, Any] = {"quant_method": method, "activation_scheme": "dynamic"}
    section |= {"weight_block_size": list(block)} if block else {"format": "float-quantized"}
    plain = saved_with_tokenizer(folder / "plain", tie_word_embeddings=False)
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    save_file({**stored, **changes}, source / "model.safetensors", {"format": "pt"})
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
    return source, plain


@pytest.mark.parametrize(
    ("method", "block"), [("fp8", (128, 96)), ("fp8", (256, 256)), ("compressed-tensors", None)]
)
def test_the_same_trits_as_of_the_decoded_weights(
    method: str, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    source, plain = quantized(tmp_path, method, block)
    report = ternarize(source, tmp_path / "a", plan=PLAN)
    ternarize(plain, tmp_path / "b", plan=PLAN)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(first) == set(second)
    for name, tensor in second.items():
        assert torch.equal(first[name], tensor), name
    assert "rounds the input of each of its layers to float8" in report.note
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "trilens"
    plan = TernaryPlan("exact", group_size=256)
    for src, name in ((source, "a.gguf"), (plain, "b.gguf")):
        ternarize(src, tmp_path / name, plan=plan, format="gguf-tq2_0")
    in_files = []
    for name in ("a.gguf", "b.gguf"):
        file = read_gguf(tmp_path / name)
        entries = file.tensors.items()
        in_files.append({n: file.content.bytes(e.begin, e.end).tobytes() for n, e in entries})
    assert in_files[0] == in_files[1]


def test_decoded_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    from trilens.checkpoint.source import Checkpoint

    source, _ = quantized(tmp_path, "fp8", (100, 96))
    stored = load_file(source / "model.safetensors")
    theirs = _dequantize_fp8_weight(stored[UP], stored[f"{UP}_scale_inv"], [100, 96], torch.float32)
    assert torch.equal(Checkpoint.open(source).tensor(UP), theirs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({f"{UP}_scale_inv": torch.ones(7, 3)}, UsageError, r"\[7, 3\], beside weights"),
        ({f"{UP}_scale_inv": torch.full((1,), torch.nan)}, CorruptFileError, "NaN or Inf"),
        (
            {"lm_head.weight": torch.zeros(320, 256).to(torch.float8_e4m3fn)},
            CorruptFileError,
            "no lm_head.weight_scale_inv",
        ),
        (
            {
                "lm_head.weight": torch.zeros(320, 256).to(torch.float8_e4m3fn),
                "lm_head.weight_scale_inv": torch.ones(1),
            },
            UsageError,
            "stores lm_head.weight packed, where trilens keeps weights as they are",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor], error: type, words: str, tmp_path: Path
) -> None:
    source, _ = quantized(tmp_path, "fp8", (128, 128), **change)
    with pytest.raises(error, match=words):
        ternarize(source, tmp_path / "out", plan=PLAN)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_other_methods_are_named(tmp_path: Path) -> None:
    for method in ("gptq", "bitsandbytes", "compressed-tensors"):
        section = {"quant_method": method, "format": "pack-quantized"}
        source = saved("llama", tmp_path / method, quantization_config=section)
        with pytest.raises(UsageError, match=f"is quantized already \\('{method}'\\)"):
            ternarize(source, tmp_path / "out", plan=PLAN)
