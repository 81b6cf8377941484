"""Outputs that are devices, pipes or sockets: refused by name, and still there afterwards."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rwkv7_published import published_tensors
from trilens.cli.main import app
from trilens.demo import demo_path

DEMO = demo_path("transformer")
COMMANDS = ("plan", "inspect", "lens", "compare", "capture", "convert", "ternarize", "gguf")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "published.pth"
    torch.save(published_tensors(2, 128, 96), file)
    return file


def words(command: str, source: Path) -> list[object]:
    return {
        "plan": ["plan", DEMO, "--data", "demo", "--budget-bits", 3],
        "inspect": ["inspect", DEMO, "-p", "x = 1"],
        "lens": ["lens", DEMO, "-p", "x = 1"],
        "compare": ["compare", DEMO, DEMO, "--data", "demo", "--max-tokens", 256],
        "capture": ["capture", DEMO, "-p", "x = 1"],
        "convert": ["convert", source],
        "ternarize": ["ternarize", DEMO],
        "gguf": ["ternarize", DEMO, "--to", "gguf-tq2_0"],
    }[command]


@pytest.fixture(params=["device", "pipe", "socket", "link to a device"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "out.gguf"
    if request.param == "device":
        yield Path("/dev/null")
    elif request.param == "link to a device":
        path.symlink_to("/dev/null")
        yield path
    elif request.param == "pipe":
        os.mkfifo(path)
        yield path
    else:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's path may have 108 bytes
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
                yield path
        finally:
            os.chdir(before)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_file_is_refused_and_left(command: str, place: Path, source: Path) -> None:
    kind = stat.S_IFMT(place.lstat().st_mode)
    there = set(place.parent.iterdir()) if place != Path("/dev/null") else set()
    result = run(*words(command, source), "-o", place)
    assert result.exit_code in {1, 2}, result.output
    assert str(place) in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert stat.S_IFMT(place.lstat().st_mode) == kind
    assert not there or set(place.parent.iterdir()) == there
