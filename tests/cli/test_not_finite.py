"""A model whose logits are not finite: the work failed, no argument was wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from trilens.cli import lazy
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import NonFiniteError


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head with one infinite weight."""
    folder = tmp_path_factory.mktemp("broken")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.inf
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_path("transformer")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "-p", "x = 1"),
        ("lens", "-p", "x = 1"),
        ("generate", "-p", "x = 1"),
        ("sensitivity", "--data", "demo", "--max-tokens", "100"),
    ],
    ids=lambda command: command[0],
)
def test_the_work_failed(broken: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    done = CliRunner().invoke(app, [name, str(broken), *options])
    said = " ".join(done.stderr.split())
    assert done.exit_code == 1, said
    assert said.startswith("trilens: ") and ("inf" in said.lower() or "nan" in said.lower())


GIVEN = {
    "demo": "",
    "inspect": "m -p x",
    "lens": "m -p x",
    "attribute": "m -p x --target y",
    "capture": "m -p x -o y",
    "generate": "m -p x",
    "patch": "m x y --target a --against b",
    "compare": "m n --data x",
    "ternarize": "m -o y",
    "ls": "y",
    "validate": "y",
    "evaluate": "m",
    "sensitivity": "m --data x",
    "plan": "m --data x --budget-bits 2",
    "serve": "m",
    "families": "",
    "convert": "y -o z",
}


@pytest.mark.parametrize("command", sorted(GIVEN))
def test_a_failure_except_where_files_alone_are_read(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def work(**_: object) -> None:
        raise NonFiniteError("a number is NaN")

    monkeypatch.setattr(lazy, "import_module", lambda _: SimpleNamespace(run=work))
    done = CliRunner().invoke(app, [command, *GIVEN[command].split()])
    assert done.stderr == "trilens: a number is NaN\n"
    assert done.exit_code == (2 if command in {"ternarize", "convert", "ls", "validate"} else 1)


def test_every_command_is_asked() -> None:
    assert set(GIVEN) == {each.callback.__name__ for each in app.registered_commands}
