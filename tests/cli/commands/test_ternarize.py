"""`trilens ternarize` and `trilens validate` as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checkpoint_cases import saved
from gguf_cases import saved_with_tokenizer
from trilens.checkpoint.format.report import TernaryReport
from trilens.checkpoint.validation import validate
from trilens.cli.main import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("cli") / "src")


def test_ternarize_prints_every_matrix_and_no_praise(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "ternarize", source, "-o", out, "--rule", "exact", "--ignore", "o_proj", "--per", "row"
    )
    assert result.exit_code == 0, result.stderr
    report = validate(out)
    assert report.plan.rule == "exact"
    for tensor in report.matrices:
        line = next(line for line in result.stdout.splitlines() if line.startswith(tensor.name))
        if tensor.relative_error is not None:
            assert f"{tensor.relative_error:.4f}" in line
    assert "the plan keeps 'o_proj'" in result.stdout
    assert "usually unusable" in result.stdout
    assert "fine" not in result.stdout.lower()
    checked = run("validate", out)
    assert checked.exit_code == 0
    assert "undamaged" in checked.stdout
    assert "usually unusable" in checked.stdout


def test_json_is_the_report(source: Path, tmp_path: Path) -> None:
    result = run("ternarize", source, "-o", tmp_path / "out", "--format", "json")
    found = json.loads(result.stdout)
    assert (found["format"], found["version"]) == ("trilens.ternary_report", 1)
    report = TernaryReport.from_dict(found)
    assert report == validate(tmp_path / "out")
    again = run("validate", tmp_path / "out", "--format", "json")
    assert json.loads(again.stdout) == {**found, "extra_files": []}
    (tmp_path / "out" / "mine.txt").touch()
    again = run("validate", tmp_path / "out", "--format", "json")
    assert json.loads(again.stdout)["extra_files"] == ["mine.txt"]
    told = run("validate", tmp_path / "out")
    assert told.exit_code == 0
    assert "1 file is not of this output, and not checked: 'mine.txt'." in told.stdout


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = run("ternarize", source, "-o", tmp_path / "out", "--dry-run", "--group-size", "32")
    assert result.exit_code == 0
    assert "planned" in result.stdout
    assert "3.000" in result.stdout
    assert "nothing was written" in result.stdout
    assert not (tmp_path / "out").exists()


def test_exit_codes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("ternarize", source, "-o", out).exit_code == 0
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    file = tmp_path / "file"
    file.write_bytes(b"")
    cases = [
        (("validate", out), 1, "truncated"),
        (("validate", tmp_path / "nowhere"), 2, "nowhere"),
        (("validate", source), 2, "has no trilens-ternary.json: it was not written by"),
        (
            ("ternarize", source, "-o", tmp_path / "x", "--ignore", "nothing"),
            2,
            "matches no tensor",
        ),
        (("ternarize", source, "-o", tmp_path / "x", "--rule", "magic"), 2, "magic"),
        (("ternarize", tmp_path / "nowhere", "-o", tmp_path / "x"), 2, "nowhere"),
        (("ternarize", source, "-o", file), 1, "cannot be written"),
    ]
    for arguments, code, words in cases:
        result = run(*arguments)
        assert result.exit_code == code, arguments
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
    result = run("validate", tmp_path / "nowhere", "--debug")
    assert type(result.exception).__name__ == "ModelNotFoundError"


def test_gguf_files(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src")
    out = tmp_path / "m.gguf"
    result = run("ternarize", source, "-o", out, "--to", "gguf-tq2_0", "--rule", "exact")
    assert result.exit_code == 0, result.stderr
    assert "2.062" in result.stdout
    assert "usually unusable" in result.stdout
    checked = run("validate", out)
    assert checked.exit_code == 0
    assert "7 of 12 tensors hold trits" in checked.stdout
    assert "all bytes have the hashes" in checked.stdout
    as_json = run("validate", out, "--format", "json")
    assert json.loads(as_json.stdout)["architecture"] == "llama"
    assert json.loads(as_json.stdout)["format"] == "trilens.gguf_report"
    both = ("--format", "json", "--to", "gguf-q2_0")
    result = run("ternarize", source, "-o", tmp_path / "n.gguf", *both)
    assert json.loads(result.stdout)["tensors"]
    out.write_bytes(out.read_bytes()[:-1])
    cases = [
        (("validate", out), 1, "truncated"),
        (("validate", tmp_path / "nowhere.gguf"), 2, "nowhere"),
        (("ternarize", source, "-o", out, "--to", "gguf-tq2_0"), 2, "exists"),
        (("ternarize", source, "-o", tmp_path / "d", "--to", "gguf-tq2_0"), 2, "end in .gguf"),
        (("ternarize", source, "-o", tmp_path / "x.gguf"), 2, "pass a gguf format"),
        (("ternarize", source, "-o", tmp_path / "x", "--to", "onnx"), 2, "'onnx'"),
        (
            ("ternarize", source, "-o", tmp_path / "x", "--format", "gguf-q2_0"),
            2,
            "'table', 'json'",
        ),
    ]
    for arguments, code, words in cases:
        result = run(*arguments)
        assert result.exit_code == code, arguments
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_what_was_written_is_said_at_the_end(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert f"wrote {out}: " in run("ternarize", source, "-o", out).stderr
    assert run("ternarize", source, "-o", tmp_path / "x", "--dry-run").stderr == ""


def test_options_that_need_another(source: Path, tmp_path: Path) -> None:
    for option in (("--max-tokens", 300), ("--seq-length", 9), ("--batch-size", 2), ("--seed", 1)):
        result = run("ternarize", source, "-o", tmp_path / "x", *option)
        assert result.exit_code == 2
        assert "add --calibrate TEXT" in result.stderr


def test_dense_weights_are_checked_too(source: Path, tmp_path: Path) -> None:
    run("ternarize", source, "-o", tmp_path / "out")
    dense = tmp_path / "dense"
    assert run("ternarize", tmp_path / "out", "-o", dense, "--to", "dense").exit_code == 0
    checked = run("validate", dense)
    assert checked.exit_code == 0, checked.stderr
    assert "files of a dense checkpoint have their sizes and hashes" in checked.stdout
    found = json.loads(run("validate", dense, "--format", "json").stdout)
    assert (found["format"], found["extra_files"]) == ("trilens.dense_check", [])
    file = dense / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    damaged = run("validate", dense)
    assert (damaged.exit_code, "model.safetensors is damaged" in damaged.stderr) == (1, True)
    (dense / "trilens-dense.json").unlink()
    unknown = run("validate", dense)
    assert unknown.exit_code == 2
    assert "dense weights of before" in unknown.stderr
