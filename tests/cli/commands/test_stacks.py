"""Commands on models with several stacks, and on GGUF files: the library's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import trilens
from tinymodels.mappings import build_as
from tolerances import assert_near
from trilens.analysis import logit_lens
from trilens.analysis.edit_effects import edit_effect, effect_between
from trilens.analysis.effect_sweeps import ablation_sweep
from trilens.analysis.metrics import logit_diff
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens

WORDS = ("the", "house", "is", "small", "das", "haus", "ist", "klein")
SOURCE, TARGET = "the house is small", "das haus ist klein"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    model = build_as("seq2seq", "t5")
    model.config.decoder_start_token_id = 0
    model.save_pretrained(folder)
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {w: 10 + i for i, w in enumerate(WORDS)}
    raw = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    trilens.ternarize(demo_path("transformer"), file, format="gguf-tq2_0")
    return file


def test_a_decoder_is_captured_with_its_source_and_target(t5: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    done = run(
        "capture", t5, "-o", file, "-p", SOURCE, "--target-text", TARGET, "--residual", "all",
        "--attention",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = Capture.load(file)
    own = Lens.from_pretrained(t5).capture(SOURCE, target=TARGET, residual="all")
    assert found.tokens == own.tokens and found.source_tokens == own.source_tokens
    assert (found.residual[0] == own.residual[0]).all()
    shown = run("inspect", t5, "-p", SOURCE, "--target-text", TARGET, "--format", "json")
    assert shown.exit_code == 0, shown.stderr


def test_a_stack_is_opened_by_name(t5: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    done = run("capture", t5, "-o", file, "-p", SOURCE, "--stack", "encoder", "--logits", "none")
    assert done.exit_code == 0, done.stderr
    own = Lens.from_pretrained(t5, stack="encoder").capture(SOURCE)
    found = Capture.load(file)
    assert found.model.model_class == own.model.model_class == "T5Stack"
    assert (found.residual[3] == own.residual[3]).all()
    absent = run("inspect", t5, "-p", SOURCE, "--stack", "vision")
    assert (absent.exit_code, "it has 'decoder', 'encoder'" in absent.stderr) == (2, True)


def test_the_logit_lens_reads_a_decoder_after_its_target(t5: Path) -> None:
    done = run("lens", t5, "-p", SOURCE, "--target-text", TARGET, "--format", "json")
    assert done.exit_code == 0, done.stderr
    lens = Lens.from_pretrained(t5)
    own = logit_lens(lens.capture(SOURCE, target=TARGET), lens, k=3)
    assert json.loads(done.stdout)["rows"] == json.loads(json.dumps(own.to_dict()))["rows"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("inspect", "{demo}", "-p", "x", "--target-text", "y"), "reads no target"),
        (
            ("sensitivity", "{demo}", "--data", "demo", "--gguf-file", "m.gguf"),
            "--gguf-file m.gguf is no source",
        ),
        (
            ("sensitivity", "{demo}", "--data", "demo", "--stack", "language"),
            "--stack language is no choice",
        ),
        (("inspect", "{demo}", "-p", "x", "--gguf-file", "no.gguf"), "no file no.gguf"),
        (("inspect", "{gguf}", "-p", "x", "--gguf-file", "m.gguf"), "leave it out"),
        (
            ("capture", "{t5}", "-o", "x", "--data", "demo", "--target-text", "y"),
            "are of one prompt",
        ),
    ],
)
def test_what_a_command_cannot_take_is_said(
    command: tuple[str, ...], words: str, t5: Path, gguf: Path
) -> None:
    places = {"demo": demo_path("transformer"), "t5": t5, "gguf": gguf}
    refused = run(*(each.format(**places) for each in command))
    assert refused.exit_code == 2, refused.stdout
    assert words in " ".join(refused.stderr.split())


def test_a_gguf_file_is_opened_by_its_name_or_its_path(gguf: Path) -> None:
    by_name = run(
        "inspect", gguf.parent, "--gguf-file", gguf.name, "-p", "def area(r):", "--format", "json"
    )
    assert by_name.exit_code == 0, by_name.stderr
    by_path = run("inspect", gguf, "-p", "def area(r):", "--format", "json")
    one, other = json.loads(by_name.stdout), json.loads(by_path.stdout)
    assert one.pop("model") != other.pop("model")
    assert one == other


def test_effects_of_edits_keep_the_source(t5: Path) -> None:
    lens = Lens.from_pretrained(t5)
    prompt = trilens.SourceTarget(SOURCE, TARGET)
    edit = trilens.edits.Ablate("mlp.out", layers=1)
    effect = edit_effect(lens, prompt, edit)
    plain = lens.capture(SOURCE, target=TARGET)
    changed = lens.capture(SOURCE, target=TARGET, edits=edit)
    own = effect_between(lens, plain, changed, (edit,))
    assert effect.to_dict() == own.to_dict()
    metric = logit_diff(14, 15)
    swept = ablation_sweep(
        lens, [prompt], metric, site="mlp.out", layers=[1], by="layer", method="zero"
    )
    assert swept.base == float(metric(plain.logits)) != float(metric(changed.logits))
    assert swept.values.ravel().tolist() == [float(metric(changed.logits))]


def test_a_patch_of_two_sources_runs_each_with_its_target(t5: Path) -> None:
    pair = SOURCE, "the haus is klein"
    lens, metric = Lens.from_pretrained(t5), logit_diff(14, 15)
    clean, corrupted = (float(metric(lens.capture(each, target=TARGET).logits)) for each in pair)
    done = run(
        "patch", t5, *pair, "--target", "#14", "--against", "#15", "--target-text", TARGET,
        "--site", "resid_post", "--format", "json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["base"], found["target"]) == (corrupted, clean)
    # The last layer's last token is all that the logits are read from; no other token's is.
    last = [each["value"] for each in found["points"] if each["layer"] == 3]
    assert_near(last, [*[corrupted] * (len(last) - 1), clean], 1e-6)
