"""A tokenizer that is given beside a checkpoint: measured with, written out, part of the order."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from string import ascii_letters

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gguf_cases import byte_level, saved_with_tokenizer
from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.evaluate import Sample
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.cli.main import app
from trilens.errors import NoTokenizerError, UsageError

TEXT = ("the quick fox and the lazy dog " * 400,)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    folder = saved_with_tokenizer(tmp_path / "src")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def test_it_is_measured_with_and_written_out(bare: Path, tmp_path: Path) -> None:
    sample = Sample("text", TEXT)
    with pytest.raises(NoTokenizerError):
        ternarize(bare, tmp_path / "none", sample=sample)
    report = ternarize(bare, tmp_path / "out", sample=sample, tokenizer=byte_level())
    assert report.sample is not None
    assert report.sample.n_tokens > 128
    validate(tmp_path / "out")
    words = "the lazy fox"
    expected = byte_level()(words).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(words).input_ids == expected
    # On to what is made of it, where a tokenizer may be given again.
    ternarize(tmp_path / "out", tmp_path / "dense", format="dense")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")(words).input_ids == expected
    ternarize(bare, tmp_path / "m.gguf", format="gguf-tq2_0", tokenizer=byte_level())


def test_it_calibrates(bare: Path, tmp_path: Path) -> None:
    letters = ["".join(Random(k).choices(ascii_letters, k=4000)) for k in range(2)]
    calibration = Calibration((letters[0],), (letters[1],), length=32, tokens=512)
    report = ternarize(bare, tmp_path / "out", calibration=calibration, tokenizer=byte_level())
    assert report.damage is not None


def test_it_replaces_the_files_of_the_sources_own(tmp_path: Path) -> None:
    source = saved_with_tokenizer(tmp_path / "src")
    (source / "merges.txt").write_text("of another tokenizer\n")
    (source / "generation_config.json").write_text("{}\n")
    other = byte_level(unk_token="<unk>")
    ternarize(source, tmp_path / "out", tokenizer=other)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "merges.txt" not in names
    assert "generation_config.json" in names
    assert AutoTokenizer.from_pretrained(tmp_path / "out").unk_token == "<unk>"


def test_another_one_is_another_order(bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ternarize(bare, out, tokenizer=byte_level())
    assert ternarize(bare, out, tokenizer=byte_level()).to_dict() == first.to_dict()
    for other in (byte_level(unk_token="<unk>"), None):
        with pytest.raises(UsageError, match="another tokenizer"):
            ternarize(bare, out, tokenizer=other)


def test_an_object_without_files_is_refused(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="str, which has no save_pretrained"):
        ternarize(bare, tmp_path / "out", tokenizer="tokenizer.json")
    assert not (tmp_path / "out").exists()


def test_the_command_reads_it(bare: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    byte_level().save_pretrained(tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0])
    for place in (tokenizer, tokenizer / "tokenizer.json"):
        out = tmp_path / "out"
        words = ["ternarize", bare, "-o", out, "--evaluate", text, "--tokenizer", place]
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.stderr
        assert (out / "tokenizer.json").is_file()
        shutil.rmtree(out)
