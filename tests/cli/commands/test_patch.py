"""`trilens patch` as a user sees it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import trilens
from trilens.analysis.patch_result import PatchSweep
from trilens.cli.main import app
from trilens.cli.run import patch as work
from trilens.cli.run.prompts import typed_token
from trilens.demo import demo_path
from trilens.progress import Step
from trilens.report.text.patching import print_patch

DEMO = demo_path("transformer")
TWO = ("The cat sat on the mat", "The dog sat on the mat")
TOKENS = ("--target", " a", "--against", " the")


def run(*arguments: object):
    runner = CliRunner(env={"COLUMNS": "80"})
    return runner.invoke(app, ["patch", *(str(argument) for argument in arguments)])


def read(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def lens() -> trilens.Lens:
    return trilens.Lens.from_pretrained(DEMO, dtype="float32")


def metric(lens: trilens.Lens) -> Any:
    a, the = (int(lens.capture(text).token_ids[0]) for text in (" a", " the"))
    return lambda logits: logits[-1, a] - logits[-1, the]


def test_json_is_the_sweep(lens: trilens.Lens) -> None:
    found = read(DEMO, *TWO, *TOKENS, "--layers", "1-2", "--direction", "noise")
    wanted = trilens.patch_sweep(lens, *TWO, metric(lens), layers=[1, 2], direction="noise")
    assert (found["format"], found["version"], found["model"]) == ("trilens.patch", 1, str(DEMO))
    assert found["points"] == wanted.to_dict()["points"]
    assert found["direction"] == "noise"


def test_heads_by_gradients(lens: trilens.Lens) -> None:
    found = read(DEMO, *TWO, *TOKENS, "--site", "attn.z", "--by", "head", "--attribution")
    wanted = trilens.attribution_patch(lens, *TWO, metric(lens), site="attn.z", by="head")
    assert found["points"] == wanted.to_dict()["points"]
    assert found["method"] == "gradient"


def test_a_token_by_its_id_is_the_token_by_its_text(lens: trilens.Lens) -> None:
    a, the = (int(lens.capture(text).token_ids[0]) for text in (" a", " the"))
    ids = ("--target", f"#{a}", "--against", f"#{the}")
    layer = ("--layers", "3")
    assert read(DEMO, *TWO, *ids, *layer) == read(DEMO, *TWO, *TOKENS, *layer)


def test_the_table_fits_80_columns() -> None:
    result = run(DEMO, *TWO, *TOKENS)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("' do'" in line for line in lines)
    assert "layer 3" in result.stdout and "resid_pre" in result.stdout


def test_prompts_of_other_lengths_have_gaps_that_are_said() -> None:
    result = run(DEMO, TWO[0], "The cat sat on the old mat", *TOKENS, "--layers", "0")
    assert result.exit_code == 0, result.output
    assert "no partner in the other prompt" in result.stdout


def test_hostile_tokens_are_shown_escaped() -> None:
    sweep = PatchSweep(
        site="resid_pre",
        by="position",
        direction="denoise",
        method="exact",
        tokens=("\x1b[31m", "\u202ex" * 40),
        layers=tuple(range(14)),
        places=(0, 1),
        values=np.full((14, 2), 0.5),
        base=0.0,
        target=1.0,
    )
    console = Console(width=80, record=True, highlight=False, markup=False)
    print_patch(sweep, console)
    text = console.export_text()
    assert "\x1b" not in text and "\u202e" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("+0.500") == 28


def test_an_interrupt_prints_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(*arguments: Any, progress: Any, **options: Any) -> PatchSweep:
        def stop(_step: Step) -> None:
            raise KeyboardInterrupt

        found: PatchSweep = trilens.patch_sweep(*arguments, progress=stop, **options)
        return found

    monkeypatch.setattr(work, "patch_sweep", sweep)
    result = run(DEMO, *TWO, *TOKENS, "--batch-size", 4)
    assert result.exit_code == 130
    assert "–" in result.stdout and "+0.000" in result.stdout
    assert "interrupted" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TWO, "--target", " a", "--against", " a"), "name two"),
        ((*TWO, "--target", "#99999999", "--against", " a"), "99999999"),
        ((*TWO, "--target", "several words here", "--against", " a"), "tokens"),
        ((*TWO, *TOKENS, "--site", "attn.zz"), "attn.z"),
        ((*TWO, *TOKENS, "--layers", "9"), "out of range"),
        ((TWO[0], TWO[0], *TOKENS), "both runs"),
        (("", TWO[0], *TOKENS), "empty"),
        ((*TWO, "--target", " a"), "--against"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(DEMO, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--site", "mixer.out"), "no recurrent mixer"), (("--by", "head"), "no heads")],
)
def test_a_site_that_the_model_has_not_is_named(arguments: tuple[str, ...], words: str) -> None:
    result = run(DEMO, *TWO, *TOKENS, *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_tokens_as_they_are_typed() -> None:
    texts = ("#7", "#", "#x", "7", " #7")
    assert [typed_token(text) for text in texts] == [7, "#", "#x", "7", " #7"]
