"""Files that are none, that have no end, or that nest without end, in every place that is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gguf_cases import saved_with_tokenizer
from hostile.outputs import OUTPUTS, check, prepare
from trilens import Lens, TernaryPlan, ternarize
from trilens.errors import TrilensError
from trilens.models.rwkv7.convert import convert_rwkv7
from trilens.text.documents import read_documents

DEEP = b"[" * 100_000 + b"]" * 100_000


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def no_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5_000_000_000)


def deep(path: Path) -> None:
    path.write_bytes(DEEP)


def deep_object(path: Path) -> None:
    path.write_bytes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


def half_a_pair(path: Path) -> None:
    path.write_bytes(b'{"model_type": "\\ud800", "text": "\\udfff"}')


def no_utf8(path: Path) -> None:
    path.write_bytes(b'{"model_type": "\xff"}')


def no_number(path: Path) -> None:
    path.write_bytes(b'{"a": NaN, "b": Infinity, "c": 1e999}')


BAD: tuple[Callable[[Path], None], ...] = (
    a_pipe, no_end, sparse, deep, deep_object, half_a_pair, no_utf8, no_number,
)  # fmt: skip


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No reader waits, and none takes what a file claims to have."""

    def waited(*_: object) -> None:
        raise AssertionError("a reader waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    started = psutil.Process().memory_info().rss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert psutil.Process().memory_info().rss - started < 700e6


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_with_tokenizer(tmp_path_factory.mktemp("dense") / "src")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_a_checkpoint_needs(
    name: str, bad: Callable[[Path], None], dense: Path, tmp_path: Path
) -> None:
    if (name, bad) == ("config.json", no_number):
        return  # other programs write them in configurations
    source = tmp_path / "src"
    shutil.copytree(dense, source)
    (source / name).unlink()
    bad(source / name)
    with pytest.raises(TrilensError):
        ternarize(source, tmp_path / "out")
    with pytest.raises(TrilensError):
        Lens.from_pretrained(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [a_pipe, no_end, sparse])
@pytest.mark.parametrize("name", ["generation_config.json", "LICENSE", "vocab.txt"])
def test_what_lies_beside_it(
    name: str, bad: Callable[[Path], None], dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "src"
    shutil.copytree(dense, source)
    (source / name).unlink(missing_ok=True)
    bad(source / name)
    with pytest.raises(TrilensError, match=name):
        ternarize(source, tmp_path / "out")
    with pytest.raises(TrilensError, match=name):
        Lens.from_pretrained(source)


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "vocab.txt", "model.safetensors"])
def test_links_out_of_a_checkpoint(name: str, dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(dense, source)
    secret = tmp_path / f"secret-{name}"
    if (source / name).exists():
        (source / name).rename(secret)
    else:
        secret.write_text("mine")
    (source / name).symlink_to(secret)
    for read in (lambda: ternarize(source, tmp_path / "out"), lambda: Lens.from_pretrained(source)):
        with pytest.raises(TrilensError, match=rf"{name} is a link that leads out"):
            read()


def test_what_only_lies_in_the_folder_is_left_alone(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(dense, source)
    sparse(source / "corpus.txt")
    (source / "results").symlink_to(tmp_path)
    Lens.from_pretrained(source)
    with pytest.raises(TrilensError, match=r"corpus\.txt is too long"):
        ternarize(source, tmp_path / "out")  # would be copied


def test_the_hubs_cache_is_made_of_links(dense: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in dense.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"blob-{path.name}")
    ternarize(snapshot, tmp_path / "out")
    Lens.from_pretrained(snapshot)
    (snapshot / "LICENSE").symlink_to(Path("..") / ".." / "refs")
    with pytest.raises(TrilensError, match="leads out"):
        ternarize(snapshot, tmp_path / "again")


@pytest.mark.parametrize("bad", BAD)
def test_plans_journals_and_texts(bad: Callable[[Path], None], dense: Path, tmp_path: Path) -> None:
    bad(tmp_path / "plan.json")
    with pytest.raises(TrilensError):
        TernaryPlan.load(tmp_path / "plan.json")
    (tmp_path / "out").mkdir()
    bad(tmp_path / "out" / "trilens-unfinished.json")
    with pytest.raises(TrilensError):
        ternarize(dense, tmp_path / "out")
    if bad is not no_number:  # pandas writes NaN where there is nothing
        bad(tmp_path / "text.jsonl")
        with pytest.raises(TrilensError):
            read_documents(tmp_path / "text.jsonl", field="model_type")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "name", ["x.safetensors", "x.pth", "in/model.safetensors", "in/config.json"]
)
def test_published_weights(name: str, bad: Callable[[Path], None], tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(made("conversion"), source)
    (tmp_path / name).unlink(missing_ok=True)
    bad(tmp_path / name)
    if (name, bad) == ("in/config.json", no_number):
        return  # other programs write them in configurations
    with pytest.raises(TrilensError):
        convert_rwkv7(source if "/" in name else tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_trilens_wrote(name: str, bad: Callable[[Path], None], tmp_path: Path) -> None:
    output = OUTPUTS[name]
    place = made(name)
    copy = tmp_path / output.name
    (shutil.copytree if place.is_dir() else shutil.copy)(place, copy)
    for file in [copy] if copy.is_file() else sorted(copy.iterdir()):
        data = file.read_bytes()
        file.unlink()
        bad(file)
        with pytest.raises(TrilensError):
            check(copy)
        file.unlink()
        file.write_bytes(data)
    check(copy)


_MADE: dict[str, Path] = {}


@pytest.fixture(autouse=True, scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("made")
    prepare(root / "sources", set(OUTPUTS))
    for name, output in OUTPUTS.items():
        _MADE[name] = root / name / output.name
        _MADE[name].parent.mkdir()
        output.write(root / "sources", 0, _MADE[name])


def made(name: str) -> Path:
    """One output, undamaged."""
    return _MADE[name]


def test_old_outputs_say_that_they_carry_no_hash(tmp_path: Path) -> None:
    place = tmp_path / "x"
    shutil.copytree(made("comparison"), place)
    manifest = json.loads((place / "comparison.json").read_text())
    old = {key: value for key, value in manifest.items() if key not in {"parts", "sha256"}}
    (place / "comparison.json").write_text(json.dumps(old))
    found = check(place)
    assert found.values["hash_checked"] is False
    assert "before files carried hashes" in found.sentences[1]
