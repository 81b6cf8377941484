"""`trilens capture`, and `trilens inspect` on what it saved and into a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from trilens.analysis.inspection import Inspection
from trilens.caches.activation import FullActivationCache
from trilens.cli.main import app
from trilens.cli.run import inspect as inspect_run
from trilens.demo import demo_path
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

DEMO, RWKV = str(demo_path("transformer")), str(demo_path("rwkv7"))


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_saved_capture_is_the_librarys(tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    result = run(
        "capture", DEMO, "-p", "import os", "-o", file, "--residual", "all", "--attention",
        "--gates", "--layers", "0,2-3", "--logits", "all",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "residual, attention, gates" in result.stdout
    assert f"wrote {file}: " in result.stderr
    saved = Capture.load(file)
    own = Lens.from_pretrained(DEMO).capture(
        "import os", residual="all", attention=True, gates=True, layers=[0, 2, 3]
    )
    assert isinstance(saved.residual, FullActivationCache)
    assert saved.residual.layers == (0, 2, 3)
    assert torch.equal(saved.logits, own.logits)
    assert torch.equal(saved.residual.get_layer(2), own.residual.get_layer(2))


def test_nothing_but_states(tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    options = ("--residual", "none", "--logits", "none", "--states")
    assert run("capture", RWKV, "-p", "x = 1", "-o", file, *options).exit_code == 0
    saved = Capture.load(file)
    assert not saved.has("residual") and not saved.has("logits")
    assert saved.states.layers == (0, 1, 2, 3)
    refused = run("inspect", file)
    assert (refused.exit_code, "no residual stream" in refused.stderr) == (2, True)


def test_inspect_tells_the_pass_from_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def status(what: str) -> Iterator[None]:
        told.append(what)
        yield
        told.append("done")

    monkeypatch.setattr(inspect_run, "status", status)
    lens = Lens.from_pretrained(DEMO)
    n_tokens = len(lens.capture("x = 1").token_ids)
    inspect_run.inspect_prompt(lens, "m", "x = 1", None, 3, effective=False)
    assert told == ["capturing m", "done", f"summarising {n_tokens} tokens", "done"]


def test_inspect_shows_a_saved_capture(tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    run("capture", DEMO, "-p", "x = 1", "-o", file, "--attention", "--gates")
    saved = json.loads(run("inspect", file, "--format", "json").stdout)
    fresh = json.loads(run("inspect", DEMO, "-p", "x = 1", "--format", "json").stdout)
    assert saved["layers"] == fresh["layers"]
    assert [token["token_id"] for token in saved["next_tokens"]] == [
        token["token_id"] for token in fresh["next_tokens"]
    ]
    for option in (("-p", "x"), ("--layers", "0"), ("--effective",), ("--dtype", "float32")):
        refused = run("inspect", file, *option)
        assert refused.exit_code == 2
        assert "leave the option out" in refused.stderr
    file.write_bytes(b"no capture")
    assert run("inspect", file).exit_code == 2


def test_inspect_states(tmp_path: Path) -> None:
    result = run("inspect", RWKV, "-p", "x = 1", "--states", "--format", "json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    states = Lens.from_pretrained(RWKV).capture("x = 1", states=True).states
    for row in data["layers"]:
        parts = states.spec(row["layer"]).parts
        assert [each["part"] for each in row["states"]] == [part.name for part in parts]
        for each in row["states"]:
            tensor = states.get(row["layer"], -1, each["part"])
            assert each["shape"] == list(tensor.shape)
            assert each["norm"] == pytest.approx(float(tensor.norm()))
    assert Inspection.from_dict(data).to_dict()["layers"][0]["states"]
    assert "norm after the last token" in run("inspect", RWKV, "-p", "x = 1", "--states").stdout
    refused = run("inspect", DEMO, "-p", "x = 1", "--states")
    assert refused.exit_code == 1


@pytest.mark.parametrize("form", ["table", "json"])
def test_inspect_into_a_file(form: str, tmp_path: Path) -> None:
    file = tmp_path / "out"
    options = ("inspect", DEMO, "-p", "x = 1", "--format", form)
    result = run(*options, "-o", file)
    assert (result.exit_code, result.stdout) == (0, "")
    assert file.read_text() == run(*options).stdout
    assert f"wrote {file}: " in result.stderr


def test_places_that_are_no_files(tmp_path: Path) -> None:
    for command in ("inspect", "capture"):
        for place, words in ((tmp_path, "is a directory"), ("/dev/null", "no regular file")):
            result = run(command, DEMO, "-p", "x", "-o", place)
            assert result.exit_code == 2
            assert words in result.stderr
            assert result.stderr.count("\n") == 1
    refused = run("inspect", DEMO)
    assert (refused.exit_code, "needs a prompt" in refused.stderr) == (2, True)


def test_the_attention_function_can_be_chosen(tmp_path: Path) -> None:
    words = ("-p", "x = 1", "--attn-implementation")
    for command, place in (("inspect", ()), ("capture", ("-o", tmp_path / "c.safetensors"))):
        done = run(command, DEMO, *words, "eager", *place)
        assert done.exit_code == 0, done.stderr
        refused = run(command, DEMO, *words, "quick", *place)
        assert refused.exit_code == 2
        assert "'quick' is not one that transformers has: give one of eager" in refused.stderr
    file = tmp_path / "c.safetensors"
    needless = run("inspect", file, "--attn-implementation", "eager")
    assert (needless.exit_code, "--attn-implementation is for" in needless.stderr) == (2, True)
