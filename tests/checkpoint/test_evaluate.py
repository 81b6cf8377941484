"""A text's perplexity before and after: measured when given, refused before anything is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from checkpoint_cases import saved
from trilens.checkpoint import Sample, SampleReport, TernaryPlan, TernaryReport, ternarize, validate
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import NoTokenizerError, TextError, UsageError
from trilens.text.token_blocks import token_blocks

TEXT = Path(json.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sample.txt"
    file.write_text(TEXT[:4000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("sample") / "out"
    ternarize(demo_path(), out, plan=TernaryPlan("exact", per="row"), sample=Sample.read(text))
    return out


def perplexity(folder: Path, text: Path) -> float:
    """By hand, from transformers' own loss on each block."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    blocks = token_blocks(tokenizer, [text.read_text(encoding="utf-8")], length=512)
    total = count = 0.0
    with torch.no_grad():
        for block in blocks:
            total += float(model(block[None], labels=block[None]).loss) * (len(block) - 1)
            count += len(block) - 1
    return math.exp(total / count)


def test_both_models_are_measured(out: Path, text: Path) -> None:
    report = validate(out)
    sample = report.sample
    assert sample is not None
    assert sample.name == "sample.txt"
    # bfloat16 models; batches of blocks sum in another order than single ones
    assert sample.perplexity_before == pytest.approx(perplexity(demo_path(), text), rel=0.01)
    assert sample.perplexity_after == pytest.approx(perplexity(out, text), rel=0.01)
    assert sample.ratio > 1.1
    card = (out / "README.md").read_text(encoding="utf-8")
    assert sample.sentence in card
    assert sample.sentence in report.verdict
    assert "usually unusable" in report.verdict
    assert TernaryReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_command_prints_it(out: Path, text: Path) -> None:
    arguments = ["ternarize", str(demo_path()), "-o", str(out), "--rule", "exact", "--per", "row"]
    shown = CliRunner().invoke(app, [*arguments, "--evaluate", str(text)])
    sample = validate(out).sample
    assert sample is not None
    assert sample.sentence in " ".join(shown.stdout.split())
    assert shown.exit_code == 0
    other = CliRunner().invoke(app, [*arguments, "--evaluate", __file__])
    assert other.exit_code == 2
    assert "another evaluation text" in other.stderr


def test_without_a_sample_the_damage_is_said_to_be_unmeasured(tmp_path: Path) -> None:
    report = ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    assert report.sample is None
    assert report.to_dict()["sample"] is None
    # Embeddings and norms are no matrices of a block: the two figures differ, and both are given.
    assert report.to_dict()["matrix_bits_per_weight"] == report.matrix_bits_per_weight
    assert report.matrix_bits_per_weight < report.bits_per_weight
    assert "damage was not measured" in report.verdict
    assert "damage was not measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_overflows_has_infinite_perplexity() -> None:
    sample = SampleReport("text", 200, 3.5, math.inf)
    assert sample.to_dict()["perplexity_after"] is None
    assert sample.to_dict()["ratio"] is None
    assert SampleReport.from_dict(sample.to_dict()) == sample
    assert "inf after" in sample.sentence
    assert "blocks" not in sample.sentence
    before = {k: v for k, v in sample.to_dict().items() if k != "block_length"}
    assert SampleReport.from_dict(before) == sample
    known = SampleReport("text", 200, 3.5, 4.0, 512)
    assert "(200 tokens in blocks of up to 512)" in known.sentence
    assert known.to_dict()["block_length"] == 512
    assert SampleReport.from_dict(known.to_dict()) == known
    for key, value in (("name", 3), ("n_tokens", "x"), ("perplexity_before", 0)):
        with pytest.raises(TypeError):
            SampleReport.from_dict({**sample.to_dict(), key: value})


def test_bad_samples_are_refused_before_anything_is_written(tmp_path: Path, text: Path) -> None:
    files = {"empty.txt": b" \n", "short.txt": b"import os\n", "binary.txt": b"\xff\xfe\x00"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    cases = {
        "empty.txt": "holds no text",
        "short.txt": "too short: it gives",
        "binary.txt": "not UTF-8",
        "missing.txt": "no text at",
    }
    for name, words in cases.items():
        with pytest.raises(TextError, match=words):
            ternarize(demo_path(), out, sample=Sample.read(tmp_path / name))
        shown = CliRunner().invoke(
            app, ["ternarize", str(demo_path()), "-o", str(out), "--evaluate", str(tmp_path / name)]
        )
        assert shown.exit_code == 2
        assert words in shown.stderr
        assert shown.stderr.count("\n") == 1
    with pytest.raises(UsageError, match="dry run"):
        ternarize(demo_path(), out, sample=Sample.read(text), dry_run=True)
    bare = saved("llama", tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(NoTokenizerError):
        ternarize(bare, out, sample=Sample.read(text))
    assert not out.exists()


def test_too_much_damage_without_a_calibration_leaves_nothing(
    out: Path, tmp_path: Path, text: Path
) -> None:
    """What was written is gone again; a caller's empty folder stays, and so does what is done."""
    arguments = ["ternarize", str(demo_path()), "--rule", "exact", "--per", "row"]
    bound = ["--evaluate", str(text), "--max-perplexity-ratio", "1.05"]
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    for folder in (new, empty):
        refused = CliRunner().invoke(app, [*arguments, *bound, "-o", str(folder)])
        assert refused.exit_code == 3
        assert "Traceback" not in refused.output and refused.stderr.count("\n") == 1
        assert "1.05" in refused.stderr and "nothing was written" in refused.stderr
    assert list(tmp_path.iterdir()) == [empty] and not list(empty.iterdir())
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    again = CliRunner().invoke(app, [*arguments, *bound, "-o", str(out)])
    assert again.exit_code == 3 and "written before" in again.stderr
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
