"""`trilens generate`: what it prints is what the library gives."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.edits import parse_edit
from trilens.lens.lens import Lens

DEMO = str(demo_path("transformer"))


def run(*arguments: object):
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)])


def test_text_and_json_are_the_librarys(tmp_path: Path) -> None:
    own = Lens.from_pretrained(DEMO).generate("import os", max_new_tokens=15)
    asked = (DEMO, "-p", "import os", "--max-new-tokens", 15)
    assert run(*asked).stdout == f"{own.text}\n"
    held = json.loads(run(*asked, "--format", "json").stdout)
    assert held == {"model": DEMO, **own.to_dict()}
    file = tmp_path / "text.json"
    assert run(*asked, "--format", "json", "-o", file).exit_code == 0
    assert json.loads(file.read_text(encoding="utf-8")) == held
    assert run(*asked, "-o", file).exit_code == 0
    assert file.read_text(encoding="utf-8") == f"{own.text}\n"


def test_options_reach_the_run() -> None:
    own = Lens.from_pretrained(DEMO).generate(
        "import os", max_new_tokens=20, temperature=1.0, top_p=0.9, seed=5, stop=["e"],
        edits=parse_edit("scale:resid_post@2 factor=0.5"),
    )  # fmt: skip
    asked = (
        DEMO, "-p", "import os", "--max-new-tokens", 20, "--temperature", 1.0, "--top-p", 0.9,
        "--seed", 5, "--stop", "e", "--edit", "scale:resid_post@2 factor=0.5",
    )  # fmt: skip
    held = json.loads(run(*asked, "--format", "json").stdout)
    assert held == {"model": DEMO, **own.to_dict()}


def test_bad_options_are_one_line() -> None:
    for options in (("--top-p", 0.5), ("--edit", "scale:nowhere@2 factor=1"), ("--stop", "")):
        result = run(DEMO, "-p", "x", *options)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
