"""One file, written whole or not at all, read without executing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError, WriteError
from trilens.io.tensors import read_tensors, write_tensors

MANIFEST = {"format": "test.kind", "version": 3, "words": ["Grüße", "\n"]}


def test_round_trip_with_aliases(tmp_path: Path) -> None:
    a = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": a, "again": a, "turned": a.T, "bf16": a.to(torch.bfloat16)}
    path = write_tensors(tmp_path / "x.tlc", tensors, MANIFEST)
    back, manifest = read_tensors(path, "test.kind", 3)
    assert manifest["words"] == MANIFEST["words"]
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert manifest["aliases"] == {"again": "a"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.tlc"]


def test_tensors_are_read_into_memory_whatever_the_default_device_is(tmp_path: Path) -> None:
    kept = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    path = write_tensors(tmp_path / "x.tlc", kept, MANIFEST)
    with torch.device("meta"):
        back, _ = read_tensors(path, "test.kind", 3)
    assert all(torch.equal(back[name], tensor) for name, tensor in kept.items())


def test_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tlc"
    write_tensors(path, {"a": torch.ones(2)}, MANIFEST)
    old = path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trilens.io.atomic.os.fsync", full)
    with pytest.raises(WriteError, match="No space"):
        write_tensors(path, {"a": torch.zeros(2)}, MANIFEST)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["x.tlc"]


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        write_tensors(tmp_path / "no" / "x.tlc", {"a": torch.ones(1)}, MANIFEST)
    with pytest.raises(UsageError, match="is a folder"):
        write_tensors(tmp_path, {"a": torch.ones(1)}, MANIFEST)
    with pytest.raises(ModelNotFoundError, match=r"nothing\.tlc"):
        read_tensors(tmp_path / "nothing.tlc", "test.kind", 3)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x.tlc", {"a": torch.ones(4)}, MANIFEST)
    with pytest.raises(CorruptFileError, match="version 3"):
        read_tensors(path, "test.kind", 4)
    with pytest.raises(CorruptFileError, match=r"not a other\.kind"):
        read_tensors(path, "other.kind", 3)
    whole = path.read_bytes()
    for cut in (0, 4, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptFileError):
            read_tensors(path, "test.kind", 3)


def test_every_dtype_and_layout_comes_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {str(d): base.to(d) for d in (torch.bool, torch.int8, torch.int64, torch.float16)}
    tensors |= {"complex": torch.complex(base, -base), "conj": torch.complex(base, base).conj()}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "strided": base[:, ::2].mT}
    path = write_tensors(tmp_path / "x", tensors, MANIFEST)
    back, _ = read_tensors(path, "test.kind", 3)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert load_file(path).keys() == tensors.keys()  # another reader
    with pytest.raises(UsageError, match="complex128"):
        write_tensors(path, {"a": torch.ones(1, dtype=torch.complex128)}, MANIFEST)


def test_one_value_of_any_stride_is_written(tmp_path: Path) -> None:
    column = torch.tensor([[5, 6, 7]])[:, 0].as_strided((1,), (3,))
    path = write_tensors(tmp_path / "x.tlc", {"one": column}, MANIFEST)
    assert read_tensors(path, "test.kind", 3)[0]["one"].tolist() == [5]


def test_every_wrong_bit_is_caught(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x", {"a": torch.ones(2)}, MANIFEST)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CorruptFileError):
            read_tensors(path, "test.kind", 3)


def test_files_from_before_there_were_hashes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    body = json.dumps({**MANIFEST, "aliases": {}})
    save_file({"a": torch.ones(2)}, path, metadata={"trilens": body})
    back, manifest = read_tensors(path, "test.kind", 3)
    assert torch.equal(back["a"], torch.ones(2))
    assert manifest["hashed"] is False
    write_tensors(path, back, MANIFEST)
    assert read_tensors(path, "test.kind", 3)[1]["hashed"] is True
