"""Names that hold control codes, through every command and every exit: none is obeyed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import trilens.errors
from gguf_cases import saved_with_tokenizer
from hostile.scale import scaled
from trilens.analysis.comparison.result import Comparison
from trilens.cli.console import shown_progress, status
from trilens.cli.main import app
from trilens.demo import demo_path
from trilens.errors import TrilensError, TrilensWarning
from trilens.lens.capture import Capture
from trilens.printable import MESSAGE_LIMIT
from trilens.progress import Step

# Window title, colour by C1, right-to-left override and isolate, mark, line separator, DEL.
HOSTILE = "a\x1b]0;owned\x07\x9b31m\u202e\u2066\u200f\u2028\x7f`|<b>b"
FILE = f"{HOSTILE}\udcff"  # a byte that is no UTF-8: what a file name may hold
UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it. " * 60
DEMO = str(demo_path("transformer"))


def run(*arguments: str | Path, code: int | None = None) -> Any:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    for stream in (done.stdout, done.stderr):
        found = UNSAFE.search(stream)
        assert found is None, (arguments, stream[max(0, found.start() - 60) : found.end() + 20])
        assert all(len(line) <= MESSAGE_LIMIT + 20 for line in stream.splitlines())
    if code is not None:
        assert done.exit_code == code, done.stderr
    if done.exit_code:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("wrote ")]
        assert len(lines) == 1 and lines[0].startswith("trilens: ")
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose directory has a hostile name."""
    path = tmp_path_factory.mktemp("models") / HOSTILE
    return saved_with_tokenizer(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / f"{FILE}.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def ternary(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / HOSTILE
    run("ternarize", folder, "-o", out, "--evaluate", text, code=0)
    return out


def test_a_prompt_and_a_directory(folder: Path) -> None:
    done = run("inspect", folder, "-p", f"the {HOSTILE} fox", code=0)
    assert r"a\x1b]0;owned" in done.stdout
    done = run("inspect", folder, "-p", f"the {HOSTILE} fox", "--format", "json", code=0)
    assert json.loads(done.stdout)["model"] == os.fsdecode(folder.name)


def test_a_directory_whose_name_is_no_utf8(folder: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / FILE
    shutil.copytree(folder, copy)
    for command in (
        ("inspect", copy, "-p", "x"),
        ("inspect", copy, "-p", "x", "--format", "json"),
        ("capture", copy, "-p", "x", "-o", tmp_path / "c"),
        ("compare", copy, copy, "--data", text, "--max-tokens", "64", "-o", tmp_path / "d"),
        ("ternarize", copy, "-o", tmp_path / "out"),
        ("sensitivity", copy, "--data", text, "--max-tokens", "64", "--seq-length", "32"),
        ("convert", copy, "-o", tmp_path / "converted"),
    ):
        run(*command)


def test_results_in_files(folder: Path, tmp_path: Path) -> None:
    for form in ("json", "table"):
        out = tmp_path / f"{form} {FILE}"
        done = run("inspect", folder, "-p", "fox", "--format", form, "-o", out, code=0)
        assert "wrote" in done.stderr
        assert UNSAFE.search(out.read_text()) is None


def test_a_capture(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / f"{HOSTILE}.safetensors"
    run("capture", folder, "-p", "the fox", "-o", out, code=0)
    assert HOSTILE in Capture.load(out).model.name
    run("inspect", out, code=0)
    run("inspect", out, "-p", "x", code=2)
    out.write_bytes(out.read_bytes()[:100])
    run("inspect", out, code=2)


def test_a_comparison(folder: Path, ternary: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / HOSTILE
    condition = ("--fail-if", "kl_nats_mean>0")
    options = ("--data", text, "--max-tokens", "128", "--seq-length", "32")
    done = run("compare", folder, ternary, *options, "-o", out, *condition, code=3)
    assert r"\x1b]0;owned" in done.stdout
    done = run("compare", folder, ternary, *options, "--format", "json", code=0)
    assert HOSTILE in json.loads(done.stdout)["before"]["name"]
    assert HOSTILE in Comparison.load(out).before.name


def test_sensitivity_and_a_plan(folder: Path, text: Path, tmp_path: Path) -> None:
    options = ("--data", text, "--max-tokens", "128", "--seq-length", "32")
    run("sensitivity", folder, *options, code=0)
    out = tmp_path / f"{FILE}.json"
    run("plan", folder, *options, "--evaluate", text, "--budget-bits", "4", "-o", out, code=0)
    run("ternarize", folder, "-o", tmp_path / "new", "--plan", out, "--dry-run", code=0)


def test_a_ternary_checkpoint_and_its_model_card(ternary: Path) -> None:
    card = (ternary / "README.md").read_text()
    assert UNSAFE.search(card) is None
    assert r"Perplexity on a\\x1b\]0;owned\\x07" in card and r"\|\<b\>b" in card
    run("validate", ternary, code=0)
    done = run("validate", ternary, "--format", "json", code=0)
    assert json.loads(done.stdout)["sample"]["name"].startswith(HOSTILE)


def test_names_of_tensors(folder: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    matrix = weights["model.layers.0.mlp.up_proj.weight"]
    for name in (
        HOSTILE,
        f"model.layers.0.{HOSTILE}.weight",
        f"model.layers.0.mlp.{HOSTILE}.weight",
    ):
        changed = {**weights, name: matrix.clone()}
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"out{len(name)}"
        for command in (
            ("inspect", copy, "-p", "the fox"),
            ("ternarize", copy, "-o", out),
            ("validate", out),
            ("sensitivity", copy, "--data", text, "--max-tokens", "64", "--seq-length", "32"),
            ("convert", copy, "-o", tmp_path / f"converted{len(name)}"),
        ):
            run(*command)
        if out.exists():
            assert UNSAFE.search((out / "README.md").read_text()) is None


def test_names_in_an_index(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(copy / "model-00001-of-00001.safetensors"))
    index = copy / "model.safetensors.index.json"
    for file, extra in (
        (f"{HOSTILE}.safetensors", {}),
        ("model-00001-of-00001.safetensors", dict.fromkeys([HOSTILE, HOSTILE * 400], "x")),
        ("model-00001-of-00001.safetensors", {f"{HOSTILE}{i}": None for i in range(5000)}),
    ):
        files = dict.fromkeys((*names, *extra), file)
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
        for command in (
            ("inspect", copy, "-p", "x"),
            ("ternarize", copy, "-o", tmp_path / "out"),
            ("convert", copy, "-o", tmp_path / "c"),
        ):
            done = run(*command)
            assert done.exit_code in (1, 2)
            assert len(done.stderr) <= MESSAGE_LIMIT + 20


@pytest.mark.parametrize(
    "key", ["model_type", "architectures", "hidden_act", "dtype", "quantization_config", "auto_map"]
)
def test_values_of_a_configuration(key: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for value in (HOSTILE, [HOSTILE * 300], {HOSTILE: HOSTILE, "quant_method": HOSTILE}):
        (copy / "config.json").write_text(json.dumps({**config, key: value}))
        for command in (
            ("inspect", copy, "-p", "x"),
            ("ternarize", copy, "-o", tmp_path / "out", "--dry-run"),
        ):
            run(*command)


def bad_bytes(path: Path) -> None:
    path.with_suffix(".txt").write_bytes(b"\xff\xfe")


def bad_line(path: Path) -> None:
    path.with_suffix(".jsonl").write_text(f"{{{HOSTILE}\n")


def bad_keys(path: Path) -> None:
    keys = {f"{HOSTILE}{i}": i for i in range(3000)}
    path.with_suffix(".jsonl").write_text(json.dumps(keys) + "\n")


def bad_columns(path: Path) -> None:
    columns = {f"{HOSTILE}{i}": ["x"] for i in range(300)}
    with path.with_suffix(".parquet").open("wb") as file:
        pq.write_table(pa.table(columns), file)


def bad_parquet(path: Path) -> None:
    path.with_suffix(".parquet").write_bytes(b"PAR1" + b"\x1b[31m" * 100)


@pytest.mark.parametrize("make", [bad_bytes, bad_line, bad_keys, bad_columns, bad_parquet])
def test_text_of_a_corpus(make: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / FILE
    corpus.mkdir()
    make(corpus / FILE)
    for command in (
        ("sensitivity", folder, "--data", corpus),
        ("compare", folder, folder, "--data", corpus, "--field", HOSTILE + "?"),
        ("ternarize", folder, "-o", tmp_path / "out", "--evaluate", corpus),
    ):
        assert run(*command).exit_code in (1, 2)


def test_a_manifest_of_somebody_else(ternary: Path, tmp_path: Path) -> None:
    """Whatever word of the manifest is replaced, `validate` and `inspect` print none of it raw."""
    copy = tmp_path / "copy"
    shutil.copytree(ternary, copy)
    (manifest,) = [
        path for path in copy.glob("*.json") if "trilens" in path.name and "index" not in path.name
    ][:1]
    whole = json.loads(manifest.read_text())
    places = list(_places(whole))
    assert len(places) > 50
    for place in places[:: max(1, len(places) // scaled(full=400, subset=40))]:
        for value in (HOSTILE, {HOSTILE * 300: [HOSTILE]}):
            manifest.write_text(json.dumps(_with(whole, place, value)))
            run("validate", copy)
            run("validate", copy, "--format", "json")


def _places(value: Any, where: tuple[Any, ...] = ()) -> Any:
    if where:
        yield where
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*where, key))
    if isinstance(value, list):
        for i, item in enumerate(value[:3]):
            yield from _places(item, (*where, i))


def _with(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = _with(value[place[0]], place[1:], new)
    return copy


def test_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / f"{FILE}.gguf"
    run("ternarize", folder, "-o", file, "--to", "gguf-tq2_0", code=0)
    run("validate", file, code=0)
    whole = file.read_bytes()
    for old, new in (
        (b"llama", b"\x1b[31m"),
        (b"ffn_up", b"\x1b[31m\x7f"),
        (b"token", b"\xc2\x9b31\x7f"),
    ):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        run("validate", file)
        run("validate", file, "--format", "json")
        run("inspect", file)


ARGUMENTS: tuple[tuple[str, ...], ...] = (
    (HOSTILE,),
    (f"--{HOSTILE}",),
    ("families", "--type", HOSTILE),
    ("families", "--format", HOSTILE),
    ("inspect", FILE, "-p", "x"),
    ("inspect", HOSTILE * 200, "-p", "x"),
    ("inspect", DEMO, "-p", "x", "--layers", HOSTILE),
    ("inspect", DEMO, "-p", "x", "--device-map", HOSTILE),
    ("inspect", DEMO, "-p", "x", "--dtype", HOSTILE),
    ("inspect", DEMO, "-p", "x", "-o", f"/no/{FILE}"),
    ("capture", DEMO, "-p", "x", "-o", f"/no/{FILE}"),
    ("compare", DEMO, FILE, "--data", "demo"),
    ("compare", DEMO, DEMO, "--data", FILE),
    ("compare", DEMO, DEMO, "--data", "demo", "--fail-if", HOSTILE),
    ("compare", DEMO, DEMO, "--data", "demo", "--fail-if", f"{HOSTILE}>1"),
    ("ternarize", FILE, "-o", "x"),
    ("ternarize", DEMO, "-o", f"/no/{FILE}", "--rule", HOSTILE),
    ("ternarize", DEMO, "-o", "x", "--dry-run", "--ignore", f"({HOSTILE}"),
    ("ternarize", DEMO, "-o", "x", "--dry-run", "--only", HOSTILE),
    ("ternarize", DEMO, "-o", "x", "--ignore", "o_proj|\udcff"),
    ("ternarize", DEMO, "-o", "x", "--dry-run", "--plan", FILE),
    ("ternarize", DEMO, "-o", "x", "--dry-run", "--revision", FILE),
    ("validate", FILE),
    ("validate", f"{FILE}.gguf"),
    ("sensitivity", DEMO, "--data", FILE),
    ("plan", DEMO, "--data", FILE, "--budget-bits", "2"),
    ("plan", DEMO, "--data", "demo", "--budget-bits", HOSTILE),
    ("convert", FILE, "-o", "x"),
    ("convert", f"{FILE}.pth", "-o", "x"),
)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda each: each[0][:10] if each else "")
def test_what_is_given_on_the_command_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code in (1, 2), done.stdout


def test_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    with shown_progress() as progress:
        assert progress is not None
        progress(Step(1, 4, HOSTILE, 12.4))
    with status(f"loading {FILE}"):
        pass
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert UNSAFE.search(shown.replace("\r", "")) is None
    assert r"a\x1b]0;owned\x07" in shown


@pytest.mark.parametrize("name", [*trilens.errors.__all__])
def test_no_message_is_longer_than_anybody_reads(name: str) -> None:
    error = getattr(trilens.errors, name)
    assert error.__str__ in {TrilensError.__str__, TrilensWarning.__str__}
    shown = str(error(f"tensor {HOSTILE * 10_000!r} {HOSTILE}: {'and ' * 10_000} rename it"))
    assert len(shown) <= MESSAGE_LIMIT and shown.endswith("rename it")
    assert UNSAFE.search(shown) is None and "\n" not in shown


def test_lists_of_a_report_have_one_way_out() -> None:
    """Nothing in `report` or `cli` prints around the functions that escape."""
    source = Path(trilens.errors.__file__).parent
    allowed = {
        "report/text/tables.py": 2,
        "cli/streams.py": 3,
        "cli/console.py": 1,
        "cli/main.py": 1,
    }
    found: dict[str, int] = {}
    for path in [*(source / "report").rglob("*.py"), *(source / "cli").rglob("*.py")]:
        code = path.read_text()
        printed = re.findall(r"typer\.echo\(|console\.print\((?!\))|(?<![\w.])print\(", code)
        if printed:
            found[str(path.relative_to(source))] = len(printed)
    assert found == allowed
