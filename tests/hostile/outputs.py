"""Everything trilens writes, small: how it is made, where it goes, and how it is checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from checkpoint_cases import saved
from corpus_cases import id_documents, tiny_lens, tiny_store
from gguf_cases import saved_with_tokenizer
from hostile.processes import RIGHT, prepared
from rwkv7_published import published_tensors
from tinymodels import build, prompt_ids
from trilens import Capture, Comparison, Lens, TernaryPlan, compare, ternarize
from trilens.cli.run.validate import check
from trilens.models.rwkv7.convert import convert_rwkv7

__all__ = ["OUTPUTS", "Output", "both_versions", "check", "content", "prepare"]


@dataclass(frozen=True)
class Output:
    """One kind of output.

    Attributes:
        write: Makes version 0 or 1 at a place, from what `prepare` made in a folder.
        name: Of the place.
        replaces: One output takes the place of another; otherwise the place must be free.
        ready: Loads what its writers share, before they are forked.
    """

    write: Callable[[Path, int, Path], object]
    name: str
    replaces: bool = False
    ready: Callable[[], object] = lambda: None


def prepare(root: Path, names: set[str]) -> None:
    """Make the sources that these outputs need."""
    root.mkdir(exist_ok=True)
    lenses = [Lens(build("llama")), Lens(build("llama", seed=1))]
    prompt = prompt_ids("llama", 9)[0]
    if "capture" in names:
        for which, lens in enumerate(lenses):
            lens.capture(prompt, attention=True, gates=True).save(root / f"{which}.tlc")
    if "comparison" in names:
        for which, pair in enumerate((lenses, lenses[::-1])):
            compare(*pair, [prompt]).save(root / f"comparison {which}")
    if "ternary" in names:
        saved("llama", root / "dense", shard_size="300KB")
    if "gguf" in names:
        saved_with_tokenizer(root / "small", vocab_size=320, hidden_size=256)
    if "conversion" in names:
        for which in (0, 1):
            tensors = published_tensors(1, 64, 32)
            shifted = {name: value + which for name, value in tensors.items()}
            torch.save(shifted, root / f"published {which}.pth")


def _store(_root: Path, which: int, out: Path) -> None:
    tiny_store(out, id_documents(6, longest=24, seed=which), shard_tokens=32, reduce=("mean",))


_PLANS = (TernaryPlan(), TernaryPlan("twn", per="row"))

OUTPUTS = {
    "capture": Output(
        lambda root, which, out: Capture.load(root / f"{which}.tlc").save(out), "x.tlc", True
    ),
    "comparison": Output(
        lambda root, which, out: Comparison.load(root / f"comparison {which}").save(out), "x", True
    ),
    "ternary": Output(
        lambda root, which, out: ternarize(root / "dense", out, plan=_PLANS[which]), "out"
    ),
    "gguf": Output(
        lambda root, which, out: ternarize(
            root / "small", out, plan=TernaryPlan(per=("row", "tensor")[which]), format="gguf-tq2_0"
        ),
        "out.gguf",
    ),
    "conversion": Output(
        lambda root, which, out: convert_rwkv7(root / f"published {which}.pth", out), "out"
    ),
    "store": Output(_store, "store", ready=tiny_lens),
}


def content(place: Path) -> dict[str, bytes]:
    """Every file at or in a place."""
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    return {str(file.relative_to(place.parent)): file.read_bytes() for file in sorted(files)}


def clear(folder: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def both_versions(output: Output, sources: Path, place: Path) -> list[dict[str, bytes]]:
    """What each version is when it is written in peace, by a process of its own."""
    found = []
    for which in (0, 1):
        clear(place.parent)
        write = partial(output.write, sources, which, place)
        assert prepared(write, sources / "modules") == RIGHT
        found.append(content(place))
    return found
