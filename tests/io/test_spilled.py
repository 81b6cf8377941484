"""Tensors put aside in a file: the same values, and none of their memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trilens.errors import WriteError
from trilens.io import spilled
from trilens.io.spilled import spilling


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(found.split()[1]) << 10


def test_what_is_small_stays_as_it_is() -> None:
    tensor = torch.ones(3)
    with spilling(spilled.KEPT_BYTES) as put_aside:
        assert put_aside(tensor) is tensor


def test_what_is_large_is_mapped_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled, "KEPT_BYTES", 1 << 20)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    size, count = 48 << 20, 5  # above 32 MiB malloc gives freed memory back
    shape = (size // 4, 2)
    before = anonymous_bytes()
    with spilling(size * count) as put_aside:
        held = [
            put_aside(torch.full((size // 4, 2), n, dtype=torch.bfloat16)) for n in range(count)
        ]
        for n, tensor in enumerate(held):
            assert tensor.shape == shape
            assert torch.equal(tensor[::4096], torch.full((size // 16384, 2), n).bfloat16())
        assert anonymous_bytes() - before < 2 * size
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == count
        odd = torch.arange(6.0).reshape(2, 3).T
        assert torch.equal(put_aside(odd), odd)
        assert put_aside(torch.empty(0)).numel() == 0
        (folder / str(count + 1)).mkdir()
        with pytest.raises(WriteError, match="TMPDIR"):
            put_aside(odd)
    assert not list(tmp_path.iterdir())
