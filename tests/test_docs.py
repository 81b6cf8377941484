"""Every block of README and docs runs as printed, page by page, and prints what is shown.

A page is one session: its Python blocks share their names, its commands one directory, which holds
what a clone holds. A ``text`` block is the output of the block before it. Commands that install,
build or measure for minutes are not run: their targets and modules have to exist.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from doc_blocks import blocks_of, compare_output, split_console
from trilens.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "console", "text"}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the commands of the pages name: demo models and the sample text."""
    for name in ("src/trilens/demo", "docs/data"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: {block.language!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_as_printed(page: Path, clone: Path) -> None:
    names: dict[str, object] = {"__name__": "__docs__"}
    printed = ""
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, where, "exec"), names)
            printed = out.getvalue()
        elif block.language == "console":
            for command, shown in split_console(block.text):
                printed = run(command, where)
                if shown.strip():
                    compare_output(shown, printed)
        else:
            compare_output(block.text, printed)


def run(command: str, where: str) -> str:
    """What a command prints. Of those that are not run, what they name has to be there."""
    words = shlex.split(command)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), where
        return run("trilens demo", where) if words[1] == "demo" else ""
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), f"{where}: no module {words[2]}"
        return ""
    if words[:2] in (["pip", "install"], ["git", "clone"]):
        return ""
    assert words[0] == "trilens", f"{where}: {command}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.Server.run", lambda *_, **__: None)  # would serve until Ctrl-C
        result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{where}: {command}\n{result.output}"
    return result.stdout


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
