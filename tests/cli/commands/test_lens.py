"""`trilens lens`: the library's own numbers, narrow, and whatever tokens and targets hold."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from trilens.analysis import logit_lens
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.lens.lens import Lens
from trilens.report.text.logit_lens import print_logit_lens

DEMO = str(demo_path("transformer"))
PROMPT = "def load(path):\n    with open(path"


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_is_the_librarys() -> None:
    result = run("lens", DEMO, "-p", PROMPT, "--target", ")", "--top-k", 2, "--format", "json")
    assert result.exit_code == 0, result.stderr
    lens = Lens.from_pretrained(DEMO)
    cap = lens.capture(PROMPT)
    own = logit_lens(cap, lens, k=2, target=")")
    plain = json.loads(result.stdout)
    assert plain.pop("model") == DEMO and plain.pop("prompt_tokens") == cap.tokens
    assert plain == json.loads(json.dumps(own.to_dict()))
    by_id = run(
        "lens", DEMO, "-p", PROMPT, "--target", f"#{own.target}", "--top-k", 2, "--format", "json"
    )
    assert by_id.stdout == result.stdout


def test_some_layers_are_still_compared_with_the_last() -> None:
    some = json.loads(run("lens", DEMO, "-p", PROMPT, "--layers", "1", "--format", "json").stdout)
    every = json.loads(run("lens", DEMO, "-p", PROMPT, "--format", "json").stdout)
    assert some["layers"] == [1] and some["rows"] == every["rows"][1:2]
    assert some["rows"][0]["kl_nats"] > 0


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_fits(width: int) -> None:
    lens = Lens.from_pretrained(DEMO)
    found = logit_lens(
        lens.capture(PROMPT, residual="all"), lens, k=4, target=")", positions=[3, 5]
    )
    out = StringIO()
    print_logit_lens(found, Console(file=out, width=width, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert sum(line.startswith("after token") for line in lines) == 2
    assert f"{float(found.target_probabilities[-1, -1]):.3f}" in out.getvalue()


def test_a_token_cannot_command_the_terminal() -> None:
    lens = Lens.from_pretrained(DEMO)
    found = logit_lens(lens.capture(PROMPT), lens, target=")")
    hostile = dict.fromkeys(found.texts, "\x1b[31m\u202eevil\n[bold]x[/bold]")
    object.__setattr__(found, "texts", hostile)
    object.__setattr__(found, "tokens", ("\x1b]0;title\x07",))
    out = StringIO()
    print_logit_lens(found, Console(file=out, width=80, highlight=False, markup=False))
    assert not set("\x1b\x07\u202e") & set(out.getvalue())


def test_what_is_refused(tmp_path: Path) -> None:
    for options, words in (
        (("--target", "foo bar"), "'foo bar' is 4 tokens"),
        (("--target", "#99999"), "token id 99999 is out of range: this model has ids 0–2047"),
        (("--layers", "9"), "this model has layers 0–3"),
        (("-o", tmp_path / "no" / "file"), "does not exist"),
    ):
        result = run("lens", DEMO, "-p", PROMPT, *options)
        assert result.exit_code in (1, 2) and result.stderr.count("\n") == 1, result.stderr
        assert words in result.stderr
    assert run("lens", DEMO, "-p", "x", "--top-k", 0).exit_code == 2
