"""`trilens convert` as a user sees it."""

from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner

from rwkv7_published import published_tensors
from trilens.cli.main import app


def test_published_weights_become_a_checkpoint(tmp_path: Path) -> None:
    source, out = tmp_path / "published.pth", tmp_path / "out"
    torch.save(published_tensors(2, 128, 96), source)
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "2 layers" in result.stdout
    assert f"wrote {out}: " in result.stderr
    again = CliRunner().invoke(app, ["convert", str(source), "-o", str(out)])
    assert again.exit_code == 2
    assert again.stderr.count("\n") == 1
    absent = CliRunner().invoke(app, ["convert", str(tmp_path / "no"), "-o", str(tmp_path / "x")])
    assert absent.exit_code == 2
