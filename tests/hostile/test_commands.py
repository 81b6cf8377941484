"""Every command with seeded arguments: exit codes 0 to 3, one line of words, no traceback."""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile.commands import COMMANDS, command_line
from hostile.fuzz import within
from hostile.scale import FULL, scaled
from hostile.targets import tiny_checkpoint, tiny_gguf
from rwkv7_published import published_tensors
from trilens.analysis.comparison.run import compare
from trilens.checkpoint.pipeline import ternarize
from trilens.cli.main import main
from trilens.corpus.capture import capture_corpus
from trilens.lens.lens import Lens
from trilens.printable import MESSAGE_LIMIT

_SECONDS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    model = tiny_checkpoint(root / "model")
    lens = Lens.from_pretrained(model)
    lens.capture([1, 2, 3], attention=True, gates=True).save(root / "capture.tlc")
    compare(lens, lens, prompts=[[1, 2, 3, 4, 5, 6]]).save(root / "comparison")
    ternarize(model, root / "ternary")
    tiny_gguf(root / "x.gguf")
    (root / "text.txt").write_text("the cat sat on a mat " * 60)
    capture_corpus(model, root / "text.txt", root / "store")
    torch.save(published_tensors(layers=1, width=16, vocab=11, head_size=8), root / "x.pth")
    return {
        "model": model, "ternary": root / "ternary", "gguf": root / "x.gguf",
        "capture": root / "capture.tlc", "comparison": root / "comparison",
        "text": root / "text.txt", "pth": root / "x.pth", "store": root / "store",
    }  # fmt: skip


def problem_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str | None]:
    """The exit code of a command line, and what is wrong with how it ended."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "stdin", io.StringIO("the cat"))
        patch.setattr("uvicorn.Server.run", lambda *_, **__: None)  # would serve until Ctrl-C
        code: Any = None
        try:
            with within(_SECONDS):
                main(arguments)
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:  # noqa: BLE001
            return -1, f"{type(error).__name__}: {error}"
    for stream in streams.values():
        stream.flush()
    errors = streams["stderr"].buffer.getvalue().decode()  # type: ignore[attr-defined]
    ours = [line for line in errors.splitlines() if line.startswith("trilens: ")]
    words = [line for line in ours if not line.startswith("trilens: note: ")]
    if code not in (0, 1, 2, 3):
        return -1, f"exit code {code}"
    if "Traceback" in errors:
        return code, errors
    if code and (len(words) != 1 if code != 3 else not words):
        return code, f"{len(words)} lines of words: {errors}"
    if any(len(line) > MESSAGE_LIMIT + 20 for line in ours):
        return code, "a message longer than anybody reads"
    return code, None


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("part", range(2))
def test_command_lines(
    part: int, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    codes: dict[str, Counter[int]] = {name: Counter() for name in COMMANDS}
    findings = []
    place = tmp_path / "work"
    here = {name: place / path.name for name, path in whole.items()}
    for seed in range(part, scaled(full=1000, subset=40), 2):
        shutil.copytree(next(iter(whole.values())).parent, place)
        monkeypatch.chdir(place)
        line = command_line(random.Random(seed), here, place)
        code, problem = problem_of(line, monkeypatch)
        if problem is not None:
            findings.append(f"seed {seed}: {line}: {problem}")
        if line[0] in codes:
            codes[line[0]][code] += 1
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(place)
    assert not findings, "\n\n".join(each[:1500] for each in findings[:8])
    assert sum(each[0] for each in codes.values()) > 0
    assert sum(each[2] for each in codes.values()) > 0
    if FULL:
        assert all(each[2] for each in codes.values()), codes
        idle = [name for name, each in codes.items() if not each[0]]
        assert len(idle) <= 2, idle


def test_an_end_that_breaks_the_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: list[str]) -> None:
        sys.exit(2)

    def talks(_: list[str]) -> None:
        print("trilens: one\ntrilens: two", file=sys.stderr)  # noqa: T201
        sys.exit(1)

    def shows(_: list[str]) -> None:
        print("Traceback (most recent call last):", file=sys.stderr)  # noqa: T201
        sys.exit(0)

    def raises(_: list[str]) -> None:
        raise OSError("raw")

    def other(_: list[str]) -> None:
        sys.exit(17)

    for bad, words in (
        (silent, "0 lines"), (talks, "2 lines"), (shows, "Traceback"), (raises, "OSError"),
        (other, "exit code 17"),
    ):  # fmt: skip
        monkeypatch.setitem(globals(), "main", bad)
        _, problem = problem_of([os.curdir], monkeypatch)
        assert problem is not None and words in problem
