"""Input that was believed: each case was accepted, hung or ended in a traceback before."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from hostile.targets import tiny_checkpoint
from tinymodels import build, prompt_ids
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.errors import (
    BeyondPositionsWarning,
    ConfigError,
    CorruptFileError,
    LoadError,
    TextError,
    UsageError,
)
from trilens.io.torch_archive import read_torch_archive
from trilens.lens.lens import Lens
from trilens.models.loading import load
from trilens.text.documents import read_documents


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 30_000_000),
        ("num_hidden_layers", 100_000),
        ("num_hidden_layers", 1),
        ("hidden_size", 48),
        ("quantization_config", {"quant_method": "unheard"}),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, key: str, value: object) -> None:
    folder = tiny_checkpoint(tmp_path / "src")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(LoadError):
        load(folder)
    with pytest.raises((LoadError, UsageError)):
        ternarize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "integers", "short"])
def test_weights_that_could_not_be_loaded(tmp_path: Path, change: str) -> None:
    folder = tiny_checkpoint(tmp_path / "src")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    weight = tensors.pop(name)
    if change != "missing":
        changed = weight.to(torch.int32) if change == "integers" else weight[:-1].contiguous()
        tensors[name] = changed
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError):
        load(folder)
    with pytest.raises((LoadError, UsageError), match="down_proj"):
        ternarize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_packed_again_gives_its_tensors(tmp_path: Path) -> None:
    whole, again = tmp_path / "a.pth", tmp_path / "b.pth"
    tensors = {"a": torch.randn(5, 7), "b": torch.arange(6.0).reshape(2, 3).t()}
    torch.save(tensors, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    found = read_torch_archive(again)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    data = bytearray(whole.read_bytes())
    data[data.index(tensors["a"].numpy().tobytes())] ^= 1
    whole.write_bytes(data)
    with pytest.raises(CorruptFileError, match="checksum"):
        read_torch_archive(whole)


def test_parquet_that_expands_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1_000_000] * 1000}), file)
    with pytest.raises(TextError, match="expands"):
        read_documents(file)


def test_a_line_separator_within_a_string_is_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n', encoding="utf-8")
    assert read_documents(file) == ("a\u2028b\u0085c", "d")


def test_a_rotary_model_runs_beyond_its_configuration() -> None:
    lens = Lens(build("llama"))
    with pytest.warns(BeyondPositionsWarning, match="configured for 160"):
        capture = lens.capture(prompt_ids("llama", 200))
    assert len(capture.tokens) == 200


def test_values_of_the_wrong_kind() -> None:
    with pytest.raises(UsageError, match="unknown"):
        TernaryPlan.from_json('{"rule": ["exact"]}')
    for path in ("x" * 300, "a\0b"):
        with pytest.raises(UsageError):
            TernaryPlan.load(path)
        with pytest.raises(UsageError):
            read_documents(path)


def test_an_epsilon_that_is_none() -> None:
    from trilens.models.rwkv7.config import RWKV7Config

    for value in (None, "x", float("inf")):
        with pytest.raises(ConfigError, match="norm_eps"):
            RWKV7Config(norm_eps=value)
