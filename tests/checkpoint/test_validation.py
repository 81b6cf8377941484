"""Damage of every kind gets a named error; nothing else ever comes out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import saved
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import CorruptFileError, LoadError, ModelNotFoundError
from trilens.io.guarded import sha256_of
from trilens.io.json import json_bytes

CODES = "model.layers.0.self_attn.q_proj.codes"
SCALE = "model.layers.0.self_attn.q_proj.scale"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ternary")
    source = saved("llama", root / "src", shard_size="150KB", dtype=torch.bfloat16)
    ternarize(source, root / "out", plan=TernaryPlan("planes", group_size=24))
    return root / "out"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard, and a plan whose rows end inside a byte where they can."""
    root = tmp_path_factory.mktemp("single")
    ternarize(saved("llama", root / "src"), root / "out")
    return root / "out"


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and make its own hash true again."""
    path = folder / "trilens-ternary.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json_bytes(body)).hexdigest()
    path.write_bytes(json_bytes({**body, "sha256": digest}))


def reseal(folder: Path) -> None:
    """Make all hashes and sizes of the manifest true for what now lies there."""

    def change(body: dict) -> None:
        for name in body["files"]:
            file = folder / name
            body["files"][name] = {"size_bytes": file.stat().st_size, "sha256": sha256_of(file)}

    edit(folder, change)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(found)
    save_file(found, path, metadata={"format": "pt"})
    reseal(folder)


def test_good_ones_pass(good: Path, single: Path) -> None:
    assert validate(good).plan == TernaryPlan("planes", group_size=24)
    assert validate(str(single)).plan == TernaryPlan()


def test_seeded_mutations_give_named_errors_only(good: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = sorted(path.name for path in good.iterdir())
    weights = [(good / name).stat().st_size for name in names]
    for number in range(400):
        folder = tmp_path / "mutant"
        shutil.copytree(good, folder)
        # Half of them fall where most bytes are, half on any file.
        share = np.array(weights) / sum(weights) if number % 2 else None
        path = folder / names[rng.choice(len(names), p=share)]
        raw = bytearray(path.read_bytes())
        at = int(rng.integers(len(raw)))
        kind = number % 5
        if kind == 0:
            raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            size = int(rng.integers(1, 64))
            raw[at : at + size] = bytes(b ^ 0xFF for b in raw[at : at + size])
        else:
            raw = None
        if raw is None:
            path.unlink()
        else:
            path.write_bytes(raw)
        with pytest.raises(LoadError) as caught:
            validate(folder)
        assert str(folder) in str(caught.value), (number, path.name)
        shutil.rmtree(folder)


def test_mutations_with_true_hashes_never_crash(single: Path, tmp_path: Path) -> None:
    """Whoever writes the hashes anew reaches the inner checks: named errors there too."""
    rng = np.random.default_rng(1)
    raw = (single / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    folder = tmp_path / "mutant"
    shutil.copytree(single, folder)
    for number in range(200):
        changed = bytearray(raw)
        at = int(rng.integers(header_end if number % 2 else len(raw)))
        changed[at] ^= 1 << int(rng.integers(8))
        (folder / "model.safetensors").write_bytes(changed)
        reseal(folder)
        try:
            validate(folder)
        except LoadError:
            refused += 1
    assert refused > 100  # the rest changed a kept weight or a scale's digits: nothing tells


def test_the_inner_checks_name_what_is_wrong(single: Path, tmp_path: Path) -> None:
    def code_3(found) -> None:
        found[CODES][5, 3] |= 0b11

    def another_trit(found) -> None:
        found[CODES][5, 3] = 0b01010101 if found[CODES][5, 3] != 0b01010101 else 0

    def nan_scale(found) -> None:
        found[SCALE].fill_(float("nan"))

    def half_scale(found) -> None:
        found[SCALE] = found[SCALE].bfloat16().expand(1, 2).contiguous()

    def no_codes(found) -> None:
        del found[CODES]

    def stranger(found) -> None:
        found["model.layers.9.weight"] = torch.zeros(3)

    def other_shape(found) -> None:
        found[CODES] = found[CODES].reshape(2, -1).contiguous()

    def signed(found) -> None:
        found[CODES] = found[CODES].view(torch.int8)

    def kept_shape(found) -> None:
        found["model.norm.weight"] = found["model.norm.weight"].reshape(2, -1)

    cases = {
        code_3: "code 3",
        another_trit: "not the share reported",
        nan_scale: "NaN or Inf",
        half_scale: "not as F32",
        no_codes: "q_proj.weight",
        stranger: "layers.9",
        other_shape: "does not hold",
        signed: "I8",
        kept_shape: "norm",
    }
    for change, words in cases.items():
        folder = tmp_path / change.__name__
        shutil.copytree(single, folder)
        change_tensors(folder, change)
        with pytest.raises(CorruptFileError, match=words):
            validate(folder)


def test_trits_past_the_end_of_a_row(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    path = source / "model.safetensors"
    # The MLP is widened to no multiple of 4, so that rows of down_proj end inside a byte.
    found = load_file(path)
    for name, tensor in list(found.items()):
        if "down_proj" in name:
            found[name] = torch.cat([tensor, torch.ones(len(tensor), 1)], 1)
        elif "up_proj" in name or "gate_proj" in name:
            found[name] = torch.cat([tensor, torch.ones(1, tensor.shape[1])])
    save_file(found, path, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] += 1
    (source / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "out"
    ternarize(source, folder)
    validate(folder)

    def past(found) -> None:
        found["model.layers.0.mlp.down_proj.codes"][2, -1] ^= 0b11000000  # what fills up, 01, to 10

    change_tensors(folder, past)
    with pytest.raises(CorruptFileError, match="past the end"):
        validate(folder)


def test_hostile_and_foreign_manifests(single: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes(b"{}")
    claim = {"size_bytes": 2, "sha256": sha256_of(outside)}
    changes = {
        "version": (lambda body: body.update(format_version=2), "format version 2"),
        "kind": (lambda body: body.update(kind="something"), "not the manifest"),
        "up": (lambda body: body["files"].update({"../outside.json": claim}), "only plain names"),
        "absolute": (lambda body: body["files"].update({str(outside): claim}), "only plain names"),
        "claim": (lambda body: body["files"].update({"config.json": 3}), "another size"),
        "report": (lambda body: body["report"]["tensors"][0].pop("shape"), "valid report"),
        "plan": (lambda body: body["report"]["plan"].update(rule="magic"), "valid report"),
        "number": (lambda body: body["report"]["tensors"][0].update(name=3), "valid report"),
        "text": (lambda body: body["report"]["tensors"][3].update(sparsity="x"), "valid report"),
        "shape": (lambda body: body["report"]["tensors"][3].update(shape=["x"]), "valid report"),
        "outcome": (lambda body: body["report"]["tensors"][3].update(outcome="?"), "valid report"),
        "list": (lambda body: body.update(report=[]), "valid report"),
        "unlisted": (lambda body: body["files"].pop("model.safetensors"), "lacks"),
    }
    for name, (change, words) in changes.items():
        folder = tmp_path / name
        shutil.copytree(single, folder)
        edit(folder, change)
        with pytest.raises(CorruptFileError, match=words):
            validate(folder)


def test_hostile_shard_names_in_the_index(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(good, folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    reseal(folder)
    with pytest.raises(CorruptFileError, match="only plain"):
        validate(folder)


def test_what_is_no_ternary_checkpoint(single: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        validate(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="not written by trilens"):
        validate(tmp_path)
    folder = tmp_path / "out"
    shutil.copytree(single, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    with pytest.raises(CorruptFileError, match="quantization_config"):
        validate(folder)
