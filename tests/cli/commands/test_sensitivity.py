"""`trilens sensitivity` and `trilens plan` as a user sees them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sensitivity_cases import WORDS, text_model
from trilens.checkpoint import ternarize
from trilens.cli.main import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    lines = [json.dumps({"text": f"# part {i}\n{WORDS}"}) for i in range(4)]
    file.write_text("\n".join(lines))
    return file


FAST = ("--max-tokens", 64, "--seq-length", 32)


def test_sensitivity_ranks_blocks_and_kinds(model: Path, data: Path) -> None:
    result = run("sensitivity", model, "--data", data, "--rule", "exact", *FAST)
    assert result.exit_code == 0, result.stderr
    for word in ("block 1", "blocks 0–1", "q_proj", "down_proj", "rank correlation", "SHA-256"):
        assert word in result.stdout
    values = run(
        "sensitivity", model, "--data", data, "--rule", "exact", *FAST, "--format", "json",
        "--no-predict",
    )  # fmt: skip
    found = json.loads(values.stdout)
    assert (found["format"], found["version"]) == ("trilens.sensitivity", 1)
    assert found["rule"] == "exact tensor"
    assert found["n_tokens"] == 64 - 2
    assert len(found["rows"]) == 2 + 7 + 2
    assert found["rank_correlation"]["kind"] is None


def test_names_and_digits_stay_at_80_columns(model: Path, data: Path) -> None:
    options = ("sensitivity", model, "--data", data, *FAST, "--each-matrix")
    found = json.loads(run(*options, "--format", "json").stdout)
    narrow = CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(each) for each in options])
    assert narrow.exit_code == 0, narrow.stderr
    assert max(map(len, narrow.stdout.splitlines())) <= 80
    for row in found["rows"]:
        assert row["name"] in narrow.stdout
        assert f"{row['kl_nats']:.4f}" in narrow.stdout
        assert f"{row['predicted_kl_nats']:.4f}" in narrow.stdout


def test_a_plan_fits_on_what_is_not_held_out(model: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_text(data.read_text())
    options = ("--budget-bits", 3, "--costs", "predicted", *FAST)
    refused = run("plan", model, "--data", data, "--calibrate", copy, "--evaluate", copy, *options)
    assert refused.exit_code == 2
    assert "are held out" in refused.stderr


@pytest.mark.parametrize("own", [False, True])
def test_a_plan_with_calibrated_rules(own: bool, model: Path, data: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "plan.json", "self" if own else data
    result = run(
        "plan", model, "--data", data, "--budget-bits", 3, "--calibrate", text, "-o", file,
        "--costs", "predicted", "--max-tokens", 512 if own else 128, "--seq-length", 64,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    entries = json.loads(file.read_text())["plan"]["matrices"]
    assert {"best", "best_planes"} & {entry["rule"] for entry in entries.values()}
    small = ("--max-tokens", 512, "--seq-length", 64) if own else ("--calibrate", data)
    done = run("ternarize", model, "-o", tmp_path / "out", "--plan", file, *small)
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "trilens"


def test_a_plan_is_what_ternarize_then_does(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = run(
        "plan", model, "--data", data, "--budget-bits", 3, "-o", file, "--costs", "predicted", *FAST
    )
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert re.search(r"held-out tokens in blocks of up to \d+: perplexity ×", words)
    content = json.loads(file.read_text())
    assert (content["format"], content["version"]) == ("trilens.plan", 1)
    assert content["measured"]["bits_per_weight"] <= 3
    assert f"in blocks of up to {content['measured']['block_length']}:" in words
    assert len(content["plan"]["matrices"]) == 14
    done = run("ternarize", model, "-o", tmp_path / "out", "--plan", file, "--format", "json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    matrices = [tensor for tensor in report["tensors"] if tensor["is_matrix"]]
    size_bytes = sum(tensor["size_bytes"] for tensor in matrices)
    n_weights = sum(tensor["shape"][0] * tensor["shape"][1] for tensor in matrices)
    assert 8 * size_bytes / n_weights == pytest.approx(content["measured"]["bits_per_weight"])
    assert report["plan"] == content["plan"]
    checked = run("validate", file)
    assert checked.exit_code == 0
    assert "undamaged. A plan: 14 matrices" in checked.stdout
    assert "Note" not in checked.stdout
    # Laid out anew it is the same; of before there were hashes, it is taken and told.
    file.write_text(json.dumps(content))
    assert run("validate", file).exit_code == 0
    for key in ("hashed", "sha256"):
        file.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        assert run("validate", file).exit_code == 1
    old = {k: v for k, v in content.items() if k not in {"hashed", "sha256"}}
    file.write_text(json.dumps(old))
    assert "before files carried hashes" in run("validate", file).stdout.replace("\n", " ")
    assert run("ternarize", model, "-o", tmp_path / "old", "--plan", file).exit_code == 0


def test_a_damaged_plan_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    run(
        "plan", model, "--data", data, "--budget-bits", 3, "-o", file, "--costs", "predicted", *FAST
    )
    before = file.read_text()
    first = next(iter(json.loads(before)["plan"]["matrices"].values()))
    changed = before.replace('"rule": "' + first["rule"] + '"', '"rule": "keep"', 1)
    assert changed != before
    file.write_text(changed)
    result = run("ternarize", model, "-o", tmp_path / "out", "--plan", file)
    assert result.exit_code == 2
    assert "does not fit its own hash" in result.stderr
    assert not (tmp_path / "out").exists()
    checked = run("validate", file)
    assert (checked.exit_code, "by hand" in checked.stderr) == (1, True)
    file.write_text("{}x")
    checked = run("validate", file)
    assert (checked.exit_code, "is no plan" in checked.stderr) == (1, True)


def test_a_bound_that_cannot_be_held_is_exit_code_3(
    model: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    arguments = ("--costs", "predicted", "--budget-bits", 2, "--max-perplexity-ratio", 1, *FAST)
    result = run("plan", model, "--data", data, "-o", file, *arguments)
    assert "perplexity × 1." in result.stdout.replace("\n", " ")
    assert result.exit_code == 3
    assert "damage is beyond the bound" in result.stderr
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sensitivity", "--rule", "magic"), "'magic' is not one of 'absmean'"),
        (("sensitivity", "--rule", "keep"), "'keep' is not one of"),
        (("sensitivity", "--rule", "gptq"), "needs a calibration text"),
        (("sensitivity", "--group-size", 0), "group size 0"),
        (("sensitivity", "--seq-length", 1), "1"),
        (("sensitivity", "--max-tokens", 1), "1"),
        (("sensitivity", "--dtype", "int3"), "int3"),
        (("sensitivity", "--field", "body"), "'body'"),
        (("plan",), "a budget of bits"),
        (("plan", "--budget-bits", 0.5), "smallest plan takes"),
        (("plan", "--budget-bits", "nan"), "budget of nan"),
        (("plan", "--max-perplexity-ratio", 0.5), "ratio 0.5 is out of range"),
        (("plan", "--budget-bits", 2, "--costs", "guessed"), "'guessed' is not one of"),
        (("plan", "--budget-bits", 2, "--storage", "zip"), "'zip' is not one of"),
        (("plan", "--budget-bits", 2, "--evaluate", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[object, ...], message: str, model: Path, data: Path
) -> None:
    command, *options = arguments
    result = run(command, model, "--data", data, *FAST, *options)
    assert result.exit_code == 2, result.stdout
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_sequences_beyond_the_configured_positions_are_told(model: Path, data: Path) -> None:
    result = run(
        "sensitivity", model, "--data", data, *FAST, "--max-tokens", 200, "--seq-length", 100
    )
    assert result.exit_code == 0, result.stderr
    assert "configured for 64" in result.stderr


def test_wrong_files_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert run("sensitivity", model, "--data", empty).exit_code == 2
    assert run("sensitivity", tmp_path / "no", "--data", data).exit_code == 2
    line = tmp_path / "line.txt"
    line.write_text("one line")
    result = run("plan", model, "--data", line, "--budget-bits", 2)
    assert "held out" in result.stderr
    result = run("plan", model, "--data", data, "--budget-bits", 2, "-o", tmp_path)
    assert "is a directory" in result.stderr
    ternarize(model, tmp_path / "ternary")
    result = run("sensitivity", tmp_path / "ternary", "--data", data)
    assert result.exit_code == 2
    assert "quantized already" in result.stderr
    plan = tmp_path / "plan.json"
    plan.write_text("{")
    result = run("ternarize", model, "-o", tmp_path / "x", "--plan", plan)
    assert (result.exit_code, "not valid JSON" in result.stderr) == (2, True)
    result = run("ternarize", model, "-o", tmp_path / "x", "--plan", tmp_path / "absent.json")
    assert (result.exit_code, "cannot be read" in result.stderr) == (2, True)
    plan.write_text("{}")
    result = run("ternarize", model, "-o", tmp_path / "x", "--plan", plan, "--rule", "exact")
    assert (result.exit_code, "--plan and --rule" in result.stderr) == (2, True)
