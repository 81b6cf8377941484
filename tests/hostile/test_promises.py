"""What SECURITY.md promises: no code of a checkpoint runs, no network, no file but the output."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gguf_cases import saved_with_tokenizer
from rwkv7_published import published_tensors
from trilens.checkpoint.format.names import MANIFEST_NAME
from trilens.cli.main import app
from trilens.models.rwkv7 import convert as convert_module

# Runs commands under an audit hook that notes what they open for writing, connect to and start.
AUDITED = """
import json, os, sys
events = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"}
def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
            events.append(["write", os.path.abspath(os.fsdecode(path))])
    elif event in CHANGES:
        for path in arguments[: 2 if event in {"os.rename", "os.link", "os.symlink"} else 1]:
            if isinstance(path, (str, bytes)):
                events.append(["write", os.path.abspath(os.fsdecode(path))])
    elif event.startswith("socket.") and event not in {"socket.gethostname"}:
        events.append(["network", event + repr(arguments[1:])])
    elif event in STARTS:
        events.append(["start", repr(arguments)])
from typer.testing import CliRunner
from trilens.cli.main import app
import torch, transformers, pyarrow, numba, trilens.checkpoint.pipeline, trilens.planning.planning
sys.addaudithook(note)
codes = []
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    codes.append([done.exit_code, done.stderr])
print(json.dumps([codes, events]))
"""


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size if path.is_file() else 0)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_tokenizer(tmp_path_factory.mktemp("models") / "model")


def test_commands_write_their_output_alone_and_open_no_connection(
    model: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("home", "temporary", "here", "text", "out")}
    for place in places.values():
        place.mkdir()
    out = places["out"]
    text = places["text"] / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away. " * 60)
    published = places["text"] / "rwkv7.pth"
    torch.save(published_tensors(layers=2, width=48, vocab=37, head_size=16), published)
    few = ["--data", text, "--max-tokens", "128", "--seq-length", "32"]
    commands = [
        ["families"],
        ["demo"],
        ["inspect", model, "-p", "the fox", "-o", out / "inspection.txt"],
        ["capture", model, "-p", "the fox", "-o", out / "capture", "--attention", "--gates"],
        ["inspect", out / "capture"],
        ["sensitivity", model, *few],
        ["plan", model, *few, "--budget-bits", "4", "--evaluate", text, "-o", out / "plan.json"],
        ["ternarize", model, "-o", out / "ternary", "--evaluate", text],
        ["ternarize", model, "-o", out / "file.gguf", "--to", "gguf-tq2_0"],
        ["validate", out / "ternary"],
        ["validate", out / "file.gguf"],
        ["compare", model, out / "ternary", *few, "-o", out / "comparison"],
        ["convert", published, "-o", out / "converted"],
    ]
    before = {name: tree(place) for name, place in places.items() if name != "out"}
    source = tree(model)
    environment = {
        **os.environ,
        "HOME": str(places["home"]),
        "TMPDIR": str(places["temporary"]),
        "HF_HOME": str(places["home"] / "hub"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, json.dumps(commands, default=str)],
        capture_output=True, text=True, check=False, env=environment, cwd=places["here"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, events = json.loads(done.stdout)
    assert [code for code, _ in codes] == [0] * len(commands), codes
    inside = (f"{out}/", f"{os.devnull}/")
    stray = [
        (kind, what) for kind, what in events
        if kind != "write" or not f"{what}/".startswith(inside)
    ]  # fmt: skip
    assert stray == []
    assert len(events) > 20, "the hook hears nothing"
    assert tree(model) == source
    for name, found in before.items():
        assert tree(places[name]) == found, f"{name} was changed"


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2) and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_no_pickle_of_a_checkpoint_is_run(name: str, model: Path, tmp_path: Path) -> None:
    copy, marker = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(model, copy)
    bomb = Runs(marker)
    torch.save(bomb, copy / name)
    CliRunner().invoke(app, ["inspect", str(copy), "-p", "x"])  # safetensors lie beside it
    (copy / "model.safetensors").unlink()
    for command in (
        ("inspect", copy, "-p", "x"),
        ("capture", copy, "-p", "x", "-o", tmp_path / "c"),
        ("compare", copy, copy, "--data", "demo"),
        ("ternarize", copy, "-o", tmp_path / "out"),
        ("sensitivity", copy, "--data", "demo"),
        ("plan", copy, "--data", "demo", "--budget-bits", "4"),
        ("convert", copy, "-o", tmp_path / "converted"),
        ("validate", copy),
    ):
        refused(*command)
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists(), "the pickle does run where it is opened"


GLOBALS = [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"),
    ("builtins", "getattr"), ("subprocess", "Popen"), ("torch", "load"), ("torch.hub", "load"),
    ("numpy", "load"), ("importlib", "import_module"), ("operator", "attrgetter"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch.serialization", "load"), ("pickle", "loads"),
    ("torch.storage", "_load_from_bytes"), ("collections", "Counter"), ("_codecs", "encode"),
]  # fmt: skip


def pickled(code: bytes, path: Path) -> Path:
    """A file as torch.save writes it, with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(64))
    return path


@pytest.mark.parametrize(("module", "name"), GLOBALS)
def test_convert_runs_nothing_that_a_pickle_names(module: str, name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    argument = f"__import__('os').mkdir({str(marker)!r})".encode()
    codes = (
        b"\x80\x02c%b\n%b\nX%b%b\x85R." % (module.encode(), name.encode(),
                                           len(argument).to_bytes(4, "little"), argument),
        b"\x80\x04\x8c%c%b\x8c%c%b\x93\x8c%c%b\x85R." % (len(module), module.encode(), len(name),
                                                      name.encode(), len(argument), argument),
    )  # fmt: skip
    for number, code in enumerate(codes):
        path = pickled(code, tmp_path / f"{number}.pth")
        done = CliRunner().invoke(app, ["convert", str(path), "-o", str(tmp_path / "out")])
        assert done.exit_code != 0
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_checkpoint_runs_unless_it_is_trusted(
    where: str, model: Path, tmp_path: Path
) -> None:
    copy, marker = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(model, copy)
    (copy / "its_own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    config = json.loads((copy / where).read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    config["auto_map"] = dict.fromkeys(names, "its_own.Thing")
    config["auto_map"]["AutoTokenizer"] = ["its_own.Thing", "its_own.Thing"]
    config |= {"model_type": "its_own"} if where == "config.json" else {"tokenizer_class": "Thing"}
    (copy / where).write_text(json.dumps(config))
    for command in (
        ("inspect", copy, "-p", "x"),
        ("capture", copy, "-p", "x", "-o", tmp_path / "c"),
        ("compare", copy, copy, "--data", "demo"),
        ("ternarize", copy, "-o", tmp_path / "out", "--evaluate", "demo"),
        ("sensitivity", copy, "--data", "demo"),
    ):
        CliRunner().invoke(app, [str(each) for each in command])
    assert not marker.exists()


def test_names_of_a_checkpoint_lead_nowhere_else(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")
    for file in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        refused("inspect", copy, "-p", "x")
        refused("ternarize", copy, "-o", tmp_path / "out")
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused("ternarize", copy, "-o", tmp_path / "out")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "a/b", "..", "\x00"])
def test_names_of_a_manifest_lead_nowhere_else(name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    CliRunner().invoke(app, ["ternarize", str(model), "-o", str(out)])
    (tmp_path / "elsewhere").write_text("x")
    path = out / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"].pop("config.json")
    path.write_text(json.dumps(manifest))
    before = tree(tmp_path)
    assert "manifest" in refused("validate", out)
    assert tree(tmp_path) == before


def test_the_reader_of_pickles_is_the_only_one() -> None:
    """`pickle` and `torch.load` stand in one file of the package, eval and exec in none."""
    source = Path(convert_module.__file__).parents[2]
    found = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            word = ast.unparse(called) if called is not None else ""
            if word in {"torch.load", "eval", "exec", "compile", "pickle.load", "pickle.loads",
                        "os.system", "subprocess.run", "subprocess.Popen"}:  # fmt: skip
                found.add((str(path.relative_to(source)), word))
    # Workers are Python's own interpreter on a module of this package.
    workers = ("workers/processes.py", "subprocess.Popen")
    assert found <= {("models/rwkv7/convert.py", "torch.load"), workers}
    text = Path(convert_module.__file__).read_text()
    assert text.count("torch.load(") == text.count("weights_only=True")
