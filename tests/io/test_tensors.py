"""One file, written whole or not at all, read without executing anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
