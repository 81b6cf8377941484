"""The command line as a user sees it: output, exit codes, one line per error, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tinymodels import build, prompt_ids, tiny_config
from tolerances import sum_error
from trilens.analysis.inspection import Inspection, inspect_capture
from trilens.cli.errors import one_line_errors
from trilens.cli.main import app
from trilens.cli.run.demo import DEMO_PROMPT
from trilens.demo import demo_path
from trilens.lens.lens import Lens
from trilens.report.text.inspection import print_inspection

DEMO = str(demo_path("transformer"))


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_demo_shows_every_layer() -> None:
    result = run("demo")
    assert result.exit_code == 0, result.stderr
    assert "4 layers" in result.stdout
    assert "mlp.gate open" in result.stdout
    assert "last token attends to" in result.stdout
    assert "next:" in result.stdout
    assert "effective attention" in result.stdout
    tables = result.stdout.split("\ndemo ")
    for table, layers in zip(tables, ("0123", "01234", "0123"), strict=True):
        lines = table[: table.index("next:")].splitlines()
        starts = [line.split()[0] for line in lines if line[:5].strip().isdecimal()]
        assert "".join(dict.fromkeys(starts)) == layers


def test_demo_puts_the_three_side_by_side() -> None:
    result = run("demo")
    table = result.stdout[result.stdout.index("side by side") :].splitlines()
    assert table[0].split() == ["side", "by", "side", "transformer", "mamba", "rwkv7"]
    rows = {line.split("  ")[0].strip(): line for line in table[2:]}
    assert rows["held-out loss"].count("nats/token") == 3
    assert "–" in rows["layer 4 reads"] and "–" not in rows["layer 3 reads"]
    assert rows["next"].count("n 0.") == 3


def test_demo_as_json_is_one_list_of_the_three() -> None:
    models = json.loads(run("demo", "--format", "json").stdout)
    assert [model["model"] for model in models] == ["demo transformer", "demo mamba", "demo rwkv7"]
    assert all(Inspection.from_dict(model).layers for model in models)


def test_inspect_json_rebuilds_the_table() -> None:
    table = run("inspect", DEMO, "-p", DEMO_PROMPT)
    as_json = run("inspect", DEMO, "-p", DEMO_PROMPT, "--format", "json")
    assert table.exit_code == as_json.exit_code == 0
    inspection = Inspection.from_dict(json.loads(as_json.stdout))
    out = StringIO()
    print_inspection(inspection, Console(file=out, width=120, highlight=False))
    assert out.getvalue() == table.stdout


def test_inspect_numbers_are_the_librarys() -> None:
    result = run("inspect", DEMO, "-p", "import os", "--format", "json", "--top-k", "2")
    data = json.loads(result.stdout)
    lens = Lens.from_pretrained(DEMO)
    cap = lens.capture("import os", attention=True, gates=True)
    assert data["version"] == 1
    assert data["tokens"] == list(cap.tokens)
    for row in data["layers"]:
        layer = row["layer"]
        stream = cap.residual.get_layer(layer).float()
        close = float(sum_error(stream.numel(), 1, torch.float32))
        assert row["residual_norm"] == pytest.approx(float(stream.norm()), rel=close)
        top = cap.attention.top_attended_positions(layer, len(cap.tokens) - 1, 2)
        assert [(a["position"], a["weight"]) for a in row["attended"]] == top
        gate = row["gates"][0]
        analysis = cap.gates.analyse("mlp.gate", layer)
        assert gate["capacity"] == analysis.effective_capacity()
        assert gate["dead"] == len(analysis.dead_gates) / gate["units"]
    assert len(data["next_tokens"]) == 2


def test_layers_and_stdin() -> None:
    result = run("inspect", DEMO, "-p", "-", "--layers", "0,2-3", "--format", "json", stdin="x = 1")
    assert [row["layer"] for row in json.loads(result.stdout)["layers"]] == [0, 2, 3]


@pytest.mark.parametrize("layers", ["4", "0-4", "a", "-1", "2-1", "", "1,,2", "²"])
def test_bad_layers(layers: str) -> None:
    result = run("inspect", DEMO, "-p", "x", f"--layers={layers}")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "layers" in result.stderr


BROKEN = {
    "unknown directory": ("./no-such-dir", "no-such-dir"),
    "empty directory": ("empty", "config.json"),
    "only pickled weights": ("pickled", "safetensors"),
    "truncated weights": ("truncated", "truncated"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    source = Path(DEMO)
    for name in ("empty", "pickled", "truncated"):
        (root / name).mkdir()
    for name in ("pickled", "truncated"):
        (root / name / "config.json").write_bytes((source / "config.json").read_bytes())
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"not opened")
    whole = (source / "model.safetensors").read_bytes()
    (root / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.mark.parametrize("case", BROKEN)
def test_bad_models(case: str, folders: Path) -> None:
    name, words = BROKEN[case]
    model = name if name.startswith("./") else str(folders / name)
    result = run("inspect", model, "-p", "x")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("prompt", "words"), [("", "empty"), ("\udc80", "prompt")])
def test_bad_prompts(prompt: str, words: str) -> None:
    result = run("inspect", DEMO, "-p", prompt)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_prompt_beyond_the_configured_positions_runs_with_a_note() -> None:
    result = run("inspect", DEMO, "-p", "x = 1\n" * 200)
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("trilens: note: ")]
    assert "configured for 512" in line and "not trained" in line


def test_usage_errors() -> None:
    assert run("inspect", DEMO).exit_code == 2
    assert run("inspect", DEMO, "-p", "x", "--format", "xml").exit_code == 2
    assert run("inspect", DEMO, "-p", "x", "--top-k", "0").exit_code == 2
    assert run("inspect", DEMO, "-p", "x", "--dtype", "float7").exit_code == 2
    assert run("nothing").exit_code == 2


def test_debug_shows_the_traceback() -> None:
    result = run("inspect", "./no-such-dir", "-p", "x", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ModelNotFoundError"


def test_version() -> None:
    assert run("--version").stdout.startswith("trilens 0.")


class _FullDisk:
    """Standard output on a disk without room."""

    def __init__(self, file) -> None:
        self.file = file

    def fileno(self) -> int:
        return self.file.fileno()

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr("sys.stdout", _FullDisk(file))
        with pytest.raises(typer.Exit) as caught, one_line_errors(debug=False):
            pass
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "trilens: output failed: No space left on device\n"


def test_a_full_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, one_line_errors(debug=False):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err.startswith("trilens: memory ran out: RuntimeError: DefaultCPU")
    with pytest.raises(RuntimeError, match="another"), one_line_errors(debug=False):
        raise RuntimeError("another one")


def test_a_terminal_without_unicode() -> None:
    command = [sys.executable, "-m", "trilens.cli.main", "inspect", DEMO, "-p", "x = 1"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "next:" in done.stdout


@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next"])
def test_every_gate_of_a_hybrid_is_readable(model_type: str) -> None:
    lens = Lens(build(model_type))
    cap = lens.capture(prompt_ids(model_type), attention=True, gates=True)
    inspection = inspect_capture(cap, name=model_type, top_k=3, token_text=str)
    out = StringIO()
    print_inspection(inspection, Console(file=out, width=120, highlight=False))
    text = out.getvalue()
    for row in inspection.layers:
        assert f"{row.residual_norm:.2f}" in text
        for gate in row.gates:
            assert any(
                line.split()[:3] == [str(row.layer), gate.name, f"{gate.mean:.2f}"]
                for line in text.splitlines()
            )


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose layers have softmax attention and a recurrence, and a tokenizer."""
    path = tmp_path_factory.mktemp("hybrid")
    config = tiny_config("falcon_h1")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_effective_attention_is_shown_with_its_signs(hybrid: str) -> None:
    options = ("inspect", hybrid, "-p", DEMO_PROMPT, "--effective", "--top-k", "4")
    table, as_json = run(*options), run(*options, "--format", "json")
    assert table.exit_code == as_json.exit_code == 0, table.stderr
    data = json.loads(as_json.stdout)
    out = StringIO()
    print_inspection(Inspection.from_dict(data), Console(file=out, width=120, highlight=False))
    assert out.getvalue() == table.stdout
    assert "effective" in table.stdout
    assert "signed weights" in table.stdout
    cap = Lens.from_pretrained(hybrid).capture(DEMO_PROMPT, attention=True, effective=True)
    last = len(cap.tokens) - 1
    weights = []
    for row in data["layers"]:
        effective = cap.effective.attention_from_position(row["layer"], last)
        shown = [item["weight"] for item in row["effective"]]
        assert shown == [float(effective[item["position"]]) for item in row["effective"]]
        assert sorted(map(abs, shown), reverse=True) == [abs(weight) for weight in shown]
        assert abs(shown[0]) == abs(effective).max()
        softmax = cap.attention.top_attended_positions(row["layer"], last, 4)
        assert [(item["position"], item["weight"]) for item in row["attended"]] == softmax
        weights += shown
    assert min(weights) < 0 < max(weights)
    # As the table shows the first of them, sign and all.
    assert f"{weights[0]:+.3g}".replace("-", "−") in table.stdout


def test_recurrent_layers_point_to_effective(hybrid: str) -> None:
    without = run("inspect", hybrid, "-p", "x = 1")
    assert "--effective shows what they attend to" in without.stdout
    assert "±weight" not in without.stdout
    refused = run("inspect", DEMO, "-p", "x = 1", "--effective")
    assert refused.exit_code == 1
    assert "no layer asked of LlamaForCausalLM is recurrent" in refused.stderr


@pytest.mark.parametrize("model_type", ["bamba", "rwkv"])
def test_a_row_holds_one_kind_where_the_layer_does(model_type: str) -> None:
    lens = Lens(build(model_type))
    attention = bool(lens.attention_layers)
    cap = lens.capture(prompt_ids(model_type, 9), attention=attention, effective=True)
    inspection = inspect_capture(cap, name=model_type, top_k=2, token_text=str)
    for row in inspection.layers:
        recurrent = row.layer in lens.effective_layers
        assert bool(row.effective) == recurrent
        assert bool(row.attended) == (row.attention_entropy_nats is not None) == (not recurrent)


def test_families_table() -> None:
    result = run("families")
    assert result.exit_code == 0
    assert "189 types" in result.stdout
    data = json.loads(run("families", "--format", "json").stdout)
    assert len(data["rows"]) == 189


def test_a_chat_is_written_by_the_template(tmp_path: Path) -> None:
    refused = run("inspect", DEMO, "-p", "hi", "--chat")
    assert refused.exit_code == 2
    assert "has no chat template" in refused.stderr
    folder = tmp_path / "chatty"
    shutil.copytree(DEMO, folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    chat = run("inspect", str(folder), "-p", "hi", "--chat", "--format", "json")
    assert chat.exit_code == 0, chat.stderr
    assert "".join(json.loads(chat.stdout)["tokens"]) == "user: hi"
    file = tmp_path / "cap.safetensors"
    assert run("capture", str(folder), "-p", "hi", "--chat", "-o", str(file)).exit_code == 0
    assert "user" in run("inspect", str(file)).stdout


@pytest.mark.parametrize("name", ["run.pth", "run.PT", "model.gguf"])
def test_files_of_weights_are_no_captures(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"weights")
    result = run("inspect", str(file), "-p", "x")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    words = "a GGUF file is not opened" if name.endswith("gguf") else "trilens convert"
    assert words in result.stderr


def test_closed_pipe_and_help() -> None:
    command = f"{sys.executable} -m trilens inspect {DEMO} -p 'x = 1' --format json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{"
    assert "Traceback" not in done.stderr
    for command in ("demo", "inspect", "families"):
        assert run(command, "--help").exit_code == 0
