"""Help and usage errors: they fit the terminal, show the choices, and are one line each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trilens.cli.main import app
from trilens.demo import demo_path

COMMANDS = [each.callback.__name__ for each in app.registered_commands]
DEMO = str(demo_path("transformer"))


def run(*arguments: str, columns: int = 80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(arguments))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(command: str) -> None:
    result = run(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "..." not in result.stdout.replace("[ARGS]...", "").replace("{AFTER}...", "")


def test_no_arguments_are_the_help() -> None:
    bare = run()
    assert bare.exit_code == 0
    assert bare.stdout == run("--help").stdout
    assert "--install-completion" in bare.stdout


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        ("inspect", "table|json"),
        ("capture", "last|all|none"),
        ("compare", "auto|float32|bfloat16|float16|float64"),
        ("ternarize", "trilens|dense|hf-bitnet|gguf-tq2_0|gguf-tq1_0|gguf-q2_0"),
        ("ternarize", "keep|q8_0|q4_0"),
        ("ternarize", "two_bit|compact"),
        ("ternarize", "tensor|row|group"),
        ("plan", "measured|predicted"),
        ("plan", "float16|bfloat16|float32"),
    ],
)
def test_closed_sets_are_shown(command: str, choices: str) -> None:
    assert choices in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspct",), "Did you mean 'inspect'?"),
        (("inspect", DEMO, "--promt", "x"), "--prompt"),
        (("inspect", DEMO, "-p", "x", "--format", "xml"), "'table', 'json'"),
        (("inspect", DEMO, "-p", "x", "--dtype", "float7"), "'auto', 'float32'"),
        (("inspect", DEMO, "-p", "x", "--top-k", "many"), "--top-k"),
        (("inspect",), "MODEL"),
        (("inspect", DEMO, "more"), "more"),
        (("capture", DEMO, "-p", "x"), "--output"),
        (("capture", DEMO, "-o", "x"), "--prompt"),
        (("compare", DEMO, DEMO), "--data"),
        (("ternarize", DEMO), "--output"),
        (
            ("ternarize", DEMO, "-o", "x", "--max-perplexity-ratio", "much"),
            "--max-perplexity-ratio",
        ),
        (("validate",), "PATH"),
        (("convert", "x"), "--output"),
        (("families", "--type"), "--type"),
        (("demo", "extra"), "extra"),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("trilens: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert "--help lists the options" in result.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    code = tmp_path / "code"
    command = f"({sys.executable} -m trilens families; echo $? > {code}) | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("type")
    assert done.stderr == ""
    assert code.read_text() == "0\n"
