"""`trilens families` and its filter."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from trilens.cli.main import app


def run(*arguments: str, columns: int = 80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["families", *arguments])


def test_a_type_is_shown_in_full() -> None:
    rows = json.loads(run("--format", "json").stdout)["rows"]
    longest = max(rows, key=lambda row: len(row["reason"]))
    name = longest["model_type"]
    shown = run("--type", name, columns=5000).stdout
    assert longest["reason"] in shown
    assert longest["reason"] not in run(columns=5000).stdout
    assert "…" not in shown.replace(" … ", " ")
    found = json.loads(run("--type", name, "--format", "json").stdout)
    assert {row["model_type"] for row in found["rows"]} == {
        row["model_type"] for row in rows if name in row["model_type"]
    }


def test_the_list_is_short_and_says_where_more_stands() -> None:
    lines = run(columns=120).stdout.splitlines()
    assert len(lines) < 189 * 2
    assert lines[-1].startswith("trilens families --type NAME")
    assert "sigmoid" not in "".join(lines)
    shown = run("--type", "gpt_oss").stdout
    assert "router (router, 0 … 1): 0–3" in shown
    assert shown.splitlines()[0] == "gpt_oss"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    result = run(columns=columns)
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "qwen3_next" in result.stdout


def test_a_type_that_is_not_there() -> None:
    result = run("--type", "abacus")
    assert result.exit_code == 2
    assert "'abacus' is in none of the 189 names" in result.stderr
