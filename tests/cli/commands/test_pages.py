"""Outputs that end in .html, and --report: pages beside what is printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from page_cases import Parsed, data_of
from trilens.cli import run as cli_run
from trilens.cli.main import app
from trilens.demo import demo_path

DEMO = str(demo_path("transformer"))
PROMPT = "def area(r): return r"


def run(*arguments: object, monkeypatch=None):
    words = [*map(str, arguments)]
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/trilens", *words])
    return CliRunner().invoke(app, words)


def blocks(file: Path) -> list[str]:
    return [block["is"] for block in data_of(file.read_text())["blocks"]]


def test_inspect(tmp_path, monkeypatch) -> None:
    out = tmp_path / "report.html"
    done = run("inspect", DEMO, "-p", PROMPT, "-o", out, monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    assert done.stdout == "" and f"wrote {out}" in done.stderr
    assert {"heads", "profiles", "lens", "chart", "table"} == set(blocks(out))
    text = "".join(Parsed(out.read_text()).text)
    assert f"trilens inspect {DEMO} -p '{PROMPT}' -o {out}" in text
    assert "/somewhere" not in text
    for fact in ("transformer", "LlamaForCausalLM", "bfloat16", "torch"):
        assert fact in text


def test_some_layers_and_a_saved_capture(tmp_path) -> None:
    out, saved = tmp_path / "x.htm", tmp_path / "cap.safetensors"
    assert run("inspect", DEMO, "-p", PROMPT, "--layers", "1,2", "-o", out).exit_code == 0
    heads = next(b for b in data_of(out.read_text())["blocks"] if b["is"] == "heads")
    assert heads["layers"] == [1, 2]
    assert run("capture", DEMO, "-p", PROMPT, "--attention", "-o", saved).exit_code == 0
    assert run("inspect", saved, "-o", out).exit_code == 0
    assert set(blocks(out)) == {"chart", "heads", "profiles"}


def test_lens_shows_every_token(tmp_path) -> None:
    out = tmp_path / "lens.html"
    assert run("lens", DEMO, "-p", PROMPT, "-o", out).exit_code == 0
    (block,) = data_of(out.read_text())["blocks"]
    assert block["positions"] == [*range(len(data_of(out.read_text())["tokens"]))]


def test_a_dry_run_has_a_report(tmp_path) -> None:
    out = tmp_path / "ternary.html"
    target = tmp_path / "ternary"
    done = run("ternarize", DEMO, "-o", target, "--dry-run", "--report", out)
    assert done.exit_code == 0, done.output
    assert "bits per weight" in done.stdout and not target.exists()
    assert blocks(out)[-1] == "table"


def test_json_and_a_page_contradict(tmp_path) -> None:
    for command in ("inspect", "lens"):
        done = run(command, DEMO, "-p", PROMPT, "--format", "json", "-o", tmp_path / "x.html")
        assert done.exit_code == 2 and "contradicts output" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_wrong_place_costs_no_load(tmp_path) -> None:
    done = run("ternarize", DEMO, "-o", tmp_path / "t", "--report", tmp_path / "no" / "x.html")
    assert done.exit_code == 2 and "does not exist" in done.stderr
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_compare(tmp_path, option: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("import os\nimport sys\n")
    out = tmp_path / "compare.html"
    done = run("compare", DEMO, DEMO, "--data", text, "--lens", "none", option, out)
    assert done.exit_code == 0, done.output
    assert "No difference" in done.stdout
    assert "No difference" in "".join(Parsed(out.read_text()).text)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["compare.html", "text.txt"]


def test_every_command_that_writes_a_result_to_a_file_says_so() -> None:
    sources = {each.stem: each.read_text() for each in Path(cli_run.__file__).parent.glob("*.py")}
    writing = {name for name, source in sources.items() if "file=output" in source}
    assert {"evaluate", "patch", "sensitivity", "lens"} <= writing
    assert {name for name in writing if "timed(output)" not in sources[name]} == set()
