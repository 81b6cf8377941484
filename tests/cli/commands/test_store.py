"""`trilens capture --data`, `trilens ls` and `trilens validate` of a store."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import trilens
from trilens.cli.main import app
from trilens.demo import demo_path

DEMO = str(demo_path("transformer"))
LINES = ['{"text": "def f(x):"}', "{broken", '{"text": "import os\\nimport sys"}', '{"text": ""}']


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(LINES))
    return file


def test_a_corpus_becomes_a_store(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    arguments = (
        "capture", DEMO, "--data", corpus, "-o", out, "--sites", "resid_post,mlp.gate",
        "--layers", "1,3", "--store-dtype", "int8", "--reduce", "mean,gating",
    )  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "1 entries could not be read and 1 are empty" in done.stdout
    assert "tokens/s" in done.stderr and f"wrote {out}: " in done.stderr
    store = trilens.open_store(out)
    assert set(store) == {(site, layer) for site in ("resid_post", "mlp.gate") for layer in (1, 3)}
    cap = trilens.Lens.from_pretrained(DEMO).capture("def f(x):", sites=["resid_post"], layers=[3])
    wanted = cap.sites["resid_post", 3].float()
    found = store["resid_post", 3].document(0)
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())

    listed = run("ls", out)
    assert listed.exit_code == 0, listed.stderr
    for words in ("resid_post", "1, 3", "d_model 256", "int8", "reducers: gating of"):
        assert words in listed.stdout
    plain = json.loads(run("ls", out, "--format", "json").stdout)
    assert plain["counts"]["bad"] == 1 and "files" not in plain

    checked = run("validate", out)
    assert checked.exit_code == 0 and "undamaged" in checked.stdout
    assert json.loads(run("validate", out, "--format", "json").stdout)["shards"] == 1
    (out / "shard-00000.safetensors").write_bytes(b"")
    assert run("validate", out).exit_code == 1
    assert run("ls", out).exit_code == 2
    assert run(*arguments).exit_code == 0
    assert run("validate", out).exit_code == 0

    refused = run(*arguments, "--seq-length", "16")
    assert (refused.exit_code, "another options" in refused.stderr) == (2, True)
    assert run(*arguments, "--seq-length", "16", "--overwrite").exit_code == 0
    strict = run(*arguments[:5], tmp_path / "strict", "--strict")
    assert (strict.exit_code, "c.jsonl, line 2" in strict.stderr) == (2, True)
    assert not (tmp_path / "strict" / "store.json").exists()


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("capture", DEMO, "--data", "-", "-o", tmp_path / "s", "--layers", 0, stdin="x = 1")
    assert done.exit_code == 0, done.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert trilens.open_store(tmp_path / "s").n_documents == 1


def test_sites_of_one_prompt(tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    arguments = ("capture", DEMO, "-p", "x = 1", "-o", file, "--residual", "none", "--layers", "2")
    done = run(*arguments, "--sites", "attn.z, resid_mid")
    assert done.exit_code == 0, done.stderr
    own = trilens.Lens.from_pretrained(DEMO).capture("x = 1", sites=["attn.z"])
    saved = trilens.Capture.load(file)
    assert torch.equal(saved.sites["attn.z", 2], own.sites["attn.z", 2])
    assert set(saved.sites) == {("attn.z", 2), ("resid_mid", 2)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "either a prompt, --prompt TEXT, or a corpus, --data TEXT"),
        (("-p", "x", "--data", "demo"), "either a prompt"),
        (("-p", "x", "--reduce", "mean"), "options of a store are of a corpus"),
        (("--data", "demo", "--attention"), "name --sites and --reduce"),
        (("--data", "demo", "--sites", "resid_pots"), "did you mean"),
        (("--data", "demo", "--layers", "77"), "layer 77"),
        (("--data", "nowhere.txt"), "no text at nowhere.txt"),
        (("--data", "demo", "--reduce", "mode"), "the reducers are"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result = run("capture", DEMO, "-o", tmp_path / "out", *options)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
