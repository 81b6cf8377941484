"""`--stack`, `--decoder-prompt` and `--gguf-file`: what the library's arguments do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import trilens
from trilens.analysis.metrics import logit_diff
from trilens.analysis.patching import patch_sweep
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.tokens import SourceTarget

DEMO = str(demo_path("transformer"))
SOURCE, TARGET = "def area(r):", "return r"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_decoder_reads_its_own_text(t5: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    asked = ("--attention", "--residual", "all")
    result = run("capture", t5, "-p", SOURCE, "--decoder-prompt", TARGET, "-o", file, *asked)
    assert result.exit_code == 0, result.stderr
    saved = Capture.load(file)
    own = Lens.from_pretrained(t5).capture(
        SOURCE, target=TARGET, attention=True, residual="all", logits="last"
    )
    assert torch.equal(saved.logits, own.logits)
    assert saved.source_tokens == own.source_tokens
    assert saved.cross_attention.layers == (0, 1)
    shown = run("inspect", t5, "-p", SOURCE, "--decoder-prompt", TARGET, "--format", "json")
    assert shown.exit_code == 0, shown.stderr
    assert len(json.loads(shown.stdout)["layers"]) == 2


def test_what_a_decoder_goes_on_with(t5: Path) -> None:
    asked = ("-p", SOURCE, "--decoder-prompt", TARGET, "--max-new-tokens", 3, "--format", "json")
    result = run("generate", t5, *asked)
    assert result.exit_code == 0, result.stderr
    own = Lens.from_pretrained(t5).generate(SOURCE, target=TARGET, max_new_tokens=3)
    assert json.loads(result.stdout)["token_ids"] == own.token_ids.tolist()
    assert json.loads(result.stdout)["prompt_tokens"] == own.prompt_tokens > 1


def test_what_is_said_of_a_decoders_next_token(t5: Path) -> None:
    lens, asked = Lens.from_pretrained(t5), ("--decoder-prompt", TARGET, "--format", "json")
    capture = lens.capture(SOURCE, target=TARGET, residual="last")
    result = run("lens", t5, "-p", SOURCE, *asked)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] == capture.tokens
    words = ("--target", "#11", "--against", "#12")
    result = run("attribute", t5, "-p", SOURCE, *words, *asked)
    assert result.exit_code == 0, result.stderr
    gap = capture.logits[-1, 11] - capture.logits[-1, 12]
    assert abs(json.loads(result.stdout)["logit_difference"] - float(gap)) < 1e-4
    result = run("patch", t5, SOURCE, "def area(s):", *words, *asked)
    assert result.exit_code == 0, result.stderr
    pair = [SourceTarget(text, TARGET) for text in (SOURCE, "def area(s):")]
    own = patch_sweep(lens, *pair, logit_diff(11, 12))
    shown = json.loads(result.stdout)["points"]
    assert len(shown) == len(own.json_rows()) > 0
    for ours, theirs in zip(shown, own.json_rows(), strict=True):
        assert ours == {**theirs, "effect": pytest.approx(theirs["effect"], abs=1e-3)}
    refused = run("lens", DEMO, "-p", SOURCE, *asked)
    assert (refused.exit_code, "reads no target" in refused.stderr) == (2, True), refused.stderr


def test_a_stack_is_named(t5: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    result = run("capture", t5, "--stack", "encoder", "-p", SOURCE, "-o", file, "--logits", "none")
    assert result.exit_code == 0, result.stderr
    assert Capture.load(file).model.model_class == "T5Stack"
    refused = run("inspect", DEMO, "--stack", "vision", "-p", SOURCE)
    assert (refused.exit_code, "vision" in refused.stderr) == (2, True), refused.stderr
    refused = run("inspect", DEMO, "--decoder-prompt", "x", "-p", SOURCE)
    assert refused.exit_code == 2 and "Traceback" not in refused.stderr
    refused = run("inspect", t5, "--chat", "--decoder-prompt", "x", "-p", SOURCE)
    assert "exclude each other" in refused.stderr
    refused = run("inspect", t5, "--stack", "sideways", "-p", SOURCE)
    assert refused.exit_code == 2


def test_weights_of_a_gguf_file(tmp_path: Path) -> None:
    trilens.ternarize(DEMO, tmp_path / "m.gguf", format="gguf-tq2_0")
    file = tmp_path / "c.tlc"
    asked = ("--gguf-file", "m.gguf", "-p", SOURCE, "-o", file)
    result = run("capture", tmp_path, *asked)
    assert result.exit_code == 0, result.stderr
    own = Lens.from_pretrained(tmp_path, gguf_file="m.gguf").capture(SOURCE, logits="last")
    assert torch.equal(Capture.load(file).logits, own.logits)
    refused = run("inspect", tmp_path, "--gguf-file", "n.gguf", "-p", SOURCE)
    assert refused.exit_code == 2 and "n.gguf" in refused.stderr


@pytest.mark.parametrize("option", [("--stack", "language"), ("--gguf-file", "m.gguf")])
def test_what_reads_a_checkpoints_matrices_refuses_them(option: tuple[str, str]) -> None:
    refused = run("sensitivity", DEMO, "--data", "demo", *option)
    assert refused.exit_code == 2
    assert f"{option[0]} {option[1]} cannot be taken here" in " ".join(refused.stderr.split())


def test_a_saved_capture_has_no_stack_to_choose(tmp_path: Path) -> None:
    file = tmp_path / "c.tlc"
    assert run("capture", DEMO, "-p", SOURCE, "-o", file).exit_code == 0
    refused = run("inspect", file, "--stack", "decoder")
    assert (refused.exit_code, "--stack is for a model" in refused.stderr) == (2, True)
