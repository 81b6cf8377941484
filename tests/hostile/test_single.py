"""Hostile inputs that no seed finds soon, one by one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from hostile.fuzz import Target, run_inputs
from hostile.resealed import resealed_folder
from hostile.targets import tiny_checkpoint
from rwkv7_published import published_tensors
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.run import compare
from trilens.checkpoint.format.names import MANIFEST_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.cli.main import app
from trilens.errors import (
    CorruptFileError,
    DtypeError,
    LoadError,
    MemoryShortError,
    TextError,
    UnsafeFormatError,
    UsageError,
    WriteError,
)
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.loading import load_tokenizer
from trilens.models.rwkv7.convert import convert_rwkv7
from trilens.text.documents import read_documents


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("single") / "model")


@pytest.mark.parametrize("longest", [[64], {"a": 1}, "64", True])
def test_a_tokenizers_length_that_is_no_number(longest: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "model_max_length": longest})
    )
    with pytest.raises(CorruptFileError, match="tokenizer"):
        load_tokenizer(folder, trusted=False)


class Refuses:
    """An integer, until it is asked which."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __index__(self) -> int:
        raise self.error


def test_prompts_that_hold_no_ids(model: Path) -> None:
    lens = Lens.from_pretrained(model)
    with pytest.raises(UsageError, match=r"layout torch\.sparse_coo"):
        lens.capture(torch.tensor([1, 2, 0]).to_sparse())
    for error in (RuntimeError("no"), ValueError("no"), OverflowError(), MemoryError()):
        with pytest.raises(DtypeError, match="at position 1"):
            lens.capture([1, Refuses(error)])


def test_published_weights_with_other_keys_or_no_values(tmp_path: Path) -> None:
    tensors = published_tensors(layers=1, width=16, vocab=11, head_size=8)
    for strange in ({1: torch.ones(2)}, {**tensors, 7: torch.ones(2)}):
        torch.save(strange, tmp_path / "x.pth")
        with pytest.raises(UnsafeFormatError):
            convert_rwkv7(tmp_path / "x.pth", tmp_path / "out")
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    torch.save(meta, tmp_path / "x.pth")
    with pytest.raises(LoadError):
        convert_rwkv7(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_onto_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(published_tensors(layers=1, width=16, vocab=11, head_size=8), tmp_path / "x.pth")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trilens.io.atomic.os.fsync", full)
        with pytest.raises(WriteError, match="No space left"):
            convert_rwkv7(tmp_path / "x.pth", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    convert_rwkv7(tmp_path / "x.pth", tmp_path / "out")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["aaaaaaaa"]}), tmp_path / "x.parquet", compression="none")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(data.replace(b"aaaaaaaa", b"\xff" * 8))
    with pytest.raises(TextError, match="not UTF-8"):
        read_documents(tmp_path / "x.parquet")


def test_a_ternary_configuration_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ternary"
    ternarize(model, folder, plan=TernaryPlan(per="row"))
    config = json.loads((folder / "config.json").read_text())
    manifest = folder / MANIFEST_NAME
    for key, value in (("hidden_size", 32), ("num_hidden_layers", 3), ("vocab_size", 10**9)):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        resealed_folder(folder, manifest, manifest.read_bytes(), "files")
        with pytest.raises(LoadError, match=r"config\.json"):
            validate(folder)
    (folder / "config.json").write_text(json.dumps(config))
    resealed_folder(folder, manifest, manifest.read_bytes(), "files")
    validate(folder)


def saved_comparison(model: Path, folder: Path) -> Path:
    lens = Lens.from_pretrained(model)
    return compare(lens, lens, prompts=[[1, 2, 3, 4, 5, 6]]).save(folder)


def resealed(folder: Path, **changes: Any) -> None:
    manifest = folder / "comparison.json"
    body = {**json.loads(manifest.read_text()), **changes}
    resealed_folder(folder, manifest, json.dumps(body).encode(), "parts")


@pytest.mark.parametrize(("n_rows", "length"), [(3_000_000, 1), (400, 2_000_000)])
def test_a_table_that_expands(n_rows: int, length: int, model: Path, tmp_path: Path) -> None:
    folder = saved_comparison(model, tmp_path / "saved")
    table = pq.read_table(folder / "table.parquet").slice(0, 1)
    schema = table.schema
    words = pa.DictionaryArray.from_arrays(
        pa.nulls(n_rows, pa.int32()).fill_null(0), ["x" * length]
    )
    same = {
        name: words
        if pa.types.is_string(schema.field(name).type)
        else pa.array(np.zeros(n_rows), schema.field(name).type)
        for name in schema.names
    }
    pq.write_table(pa.table(same).cast(schema), folder / "table.parquet", compression="zstd")
    assert (folder / "table.parquet").stat().st_size < 1_000_000
    resealed(folder)
    target = Target(lambda _: None, lambda *_: folder, lambda f: void(Comparison.load(f)), 1, 1)
    (tmp_path / "run").mkdir()
    findings, refused = run_inputs(target, range(1), tmp_path / "run")
    assert not findings and refused == 1, findings


def void(_: Any) -> None:
    """Nothing of a result."""


@pytest.mark.parametrize(
    "changes",
    [{"options": "text"}, {"n_tokens": "many"}, {"notes": "text"}, {"notes": [1]}, {"axes": []},
     {"before": {"name": 1}}, {"n_prompts": True}],
)  # fmt: skip
def test_a_comparison_of_other_types(changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    folder = saved_comparison(model, tmp_path / "saved")
    Comparison.load(folder)
    resealed(folder, **changes)
    with pytest.raises(CorruptFileError, match="is not a whole comparison"):
        Comparison.load(folder)


LONG = "x" * 300
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("inspect", LONG, "-p", "x"),
    ("inspect", "MODEL", "-p", "x", "-o", LONG),
    ("capture", "MODEL", "-p", "x", "-o", LONG),
    ("compare", LONG, "MODEL", "--data", "demo"),
    ("compare", "MODEL", "MODEL", "--data", LONG),
    ("compare", "MODEL", "MODEL", "--data", "demo", "-o", LONG),
    ("ternarize", "MODEL", "-o", LONG),
    ("ternarize", "MODEL", "-o", "out", "--plan", LONG),
    ("ternarize", "MODEL", "-o", "out", "--evaluate", LONG),
    ("validate", LONG),
    ("sensitivity", "MODEL", "--data", LONG),
    ("plan", "MODEL", "--data", "demo", "--budget-bits", "2", "-o", LONG),
    ("convert", LONG, "-o", "out"),
    ("convert", "MODEL", "-o", LONG),
)


@pytest.mark.parametrize("path", [LONG, f"a/{LONG}", "x/" * 3000, "a\0b"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each[0])
def test_a_path_that_no_file_system_has(
    command: tuple[str, ...], path: str, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [{LONG: path, "MODEL": str(model)}.get(each, each) for each in command]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "output failed" not in done.stderr


def test_a_tensor_larger_than_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tlc"
    Lens.from_pretrained(model).capture([1, 2]).save(path)

    def none_left(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("trilens.io.tensors.torch.empty", none_left)
    with pytest.raises(MemoryShortError, match="more than there is memory for"):
        Capture.load(path)
