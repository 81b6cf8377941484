"""Plans with entries for single matrices, and compact storage."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_cases import load, saved, tensors
from tinymodels import prompt_ids
from tolerances import assert_near
from trilens.checkpoint import TernaryPlan, TrilensConfig, ternarize, validate
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.errors import ConfigError, CorruptFileError, UsageError, ValueRangeError
from trilens.ternary.quantize import PerLayerQuant

KINDS = (
    MatrixPlan("planes", group_size=8),
    MatrixPlan("keep"),
    MatrixPlan("asymmetric", per="row"),
    MatrixPlan("exact", per="tensor"),
    None,  # the plan's general options
)
GENERAL: dict[str, Any] = {"rule": "exact", "group_size": 16, "scale_dtype": "float16"}


def entries(source: Path, folder: Path) -> dict[str, MatrixPlan]:
    """A different entry for each matrix in turn; the experts of a layer share one."""
    report = ternarize(source, folder, dry_run=True)
    homes: dict[str, MatrixPlan | None] = {}
    found = {}
    for tensor in report.coded:
        home = re.split("experts", tensor.name)[0] if "experts" in tensor.name else tensor.name
        entry = homes.setdefault(home, KINDS[len(homes) % len(KINDS)])
        if entry is not None:
            found[tensor.name] = entry
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(prompt_ids("llama", 20)).logits


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "rwkv"])
def test_every_matrix_as_its_entry_says(model_type: str, tmp_path: Path) -> None:
    source = saved(model_type, tmp_path / "src")
    own = entries(source, tmp_path / "none")
    plans = {
        storage: TernaryPlan(**GENERAL, matrices=own, storage=storage)  # type: ignore[arg-type]
        for storage in ("two_bit", "compact")
    }
    reports = {}
    for storage, plan in plans.items():
        assert TernaryPlan.from_json(plan.to_json()) == plan
        reports[storage] = ternarize(source, tmp_path / storage, plan=plan)
        assert validate(tmp_path / storage) == reports[storage]
    assert reports["compact"].size_bytes < reports["two_bit"].size_bytes
    kept = {tensor.name for tensor in reports["compact"].fallbacks}
    assert kept == {name for name, entry in own.items() if entry.rule == "keep"}
    packed = load(tmp_path / "compact")
    wanted = logits(load(tmp_path / "two_bit"))
    assert torch.equal(logits(packed), wanted)
    packed.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.quantization_config.storage == "two_bit"
    assert_near(logits(again), wanted, 1e-5)
    dense = load(source)
    if not any("experts" in name for name in own):
        for tensor in reports["compact"].coded:
            options = plans["compact"].of(tensor.name)
            parameter = dense.get_parameter(tensor.name).detach()
            turned = model_type == "gpt2"
            quant = PerLayerQuant.quantize(
                parameter.T if turned else parameter,
                tensor.name,
                rule=options.rule,
                per=options.per,
                group_size=options.group_size,
                scale_dtype="float16",
            )
            parameter.copy_(quant.reconstruct().T if turned else quant.reconstruct())
        # RWKV-4 halves its residual, a packed one does not: its norms' ε weighs otherwise.
        assert_near(logits(dense), wanted, 2e-3 if model_type == "rwkv" else 1e-4, least=1.0)


def test_bits_of_compact_storage(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    plan = TernaryPlan(rule="planes", group_size=32, scale_dtype="float16", storage="compact")
    report = ternarize(source, tmp_path / "out", plan=plan)
    held = tensors(tmp_path / "out")
    for tensor in report.coded:
        rows, cols = tensor.shape
        stem = tensor.name.removesuffix(".weight")
        assert held[f"{stem}.codes"].shape == (rows, -(-cols // 5))
        assert held[f"{stem}.second_scale"].dtype == torch.float16
        size_bytes = 2 * rows * (-(-cols // 5) + 2 * -(-cols // 32))
        assert tensor.bits_per_weight == 8 * size_bytes / (rows * cols)


def test_a_byte_that_is_no_five_trits_is_found(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    out = tmp_path / "out"
    ternarize(source, out, plan=TernaryPlan(rule="exact", storage="compact"))
    shard = out / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = next(name for name in header if name.endswith("q_proj.codes"))
    place = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
    raw[place] = 250
    shard.write_bytes(raw)
    with pytest.raises(CorruptFileError, match="byte above 242"):
        load(out)
    # A manifest that was made to fit does not hide it.
    manifest = json.loads((out / "trilens-ternary.json").read_text())
    manifest["files"][shard.name]["sha256"] = hashlib.sha256(raw).hexdigest()
    manifest.pop("sha256")
    body = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    manifest["sha256"] = hashlib.sha256(body).hexdigest()
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (out / "trilens-ternary.json").write_text(text)
    with pytest.raises(CorruptFileError, match="byte above 242"):
        validate(out)


def test_entries_that_cannot_be_followed(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path / "src")
    keep = {"lm_head.weight": MatrixPlan("keep")}
    with pytest.raises(UsageError, match=r"entry for 'lm_head\.weight'"):
        ternarize(source, tmp_path / "out", plan=TernaryPlan(matrices=keep))
    report = ternarize(source, tmp_path / "out", dry_run=True)
    one = next(tensor.name for tensor in report.coded if "experts" in tensor.name)
    unlike = {one: MatrixPlan("exact", group_size=8)}
    with pytest.raises(UsageError, match=r"is merged into .* the same options"):
        ternarize(source, tmp_path / "out", plan=TernaryPlan(matrices=unlike))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "is 3: an object with a rule"),
        ({}, "an object with a rule"),
        ({"rule": "magic"}, "rule 'magic' is unknown"),
        ({"rule": "exact", "bits": 2}, "no option 'bits'"),
        ({"rule": "keep", "group_size": 8}, "is kept has no scales"),
        ({"rule": "exact", "per": "row", "group_size": 8}, "has no meaning"),
    ],
)
def test_entries_that_cannot_be(entry: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TernaryPlan.from_dict({"matrices": {"a.weight": entry}})


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueRangeError, match="group size 0"):
        MatrixPlan("exact", group_size=0)
    with pytest.raises(UsageError, match="storage 'zip' is unknown"):
        TernaryPlan(storage="zip")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="an object by name"):
        TernaryPlan.from_dict({"matrices": []})
    with pytest.raises(UsageError, match="pass a MatrixPlan"):
        TernaryPlan(matrices={"a": "keep"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="storage 'zip'"):
        TrilensConfig(storage="zip")
