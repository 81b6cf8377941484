"""What storing costs, what the loader gives, what workers gain, and whether memory stays flat.

    python -m benchmarks.store [--ray]

An 88M-parameter Llama with random weights, documents of 50 to 500 random tokens, the residual
streams of two layers in bfloat16. Workers and memory are measured on processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import llama_88m, peak_bytes, ratios, save
from trilens import Lens, StoreOptions, capture_corpus, open_store
from trilens.corpus.shards import batches

LAYERS = (4, 8)
OPTIONS = {"layers": LAYERS, "dtype": "bfloat16", "shard_tokens": 4096, "batch_tokens": 2048}
VOCAB = 4096


def documents(tokens: int, seed: int = 0) -> list[list[int]]:
    """Documents of random tokens, so many in all."""
    drawn = random.Random(seed)
    found: list[list[int]] = []
    while tokens > 0:
        length = min(tokens, drawn.randint(50, 500))
        found.append([drawn.randrange(VOCAB) for _ in range(length)])
        tokens -= length
    return found


def shards_of(texts: list[list[int]]) -> list[list[list[int]]]:
    """The batches that the store makes of documents, shard by shard."""
    shards: list[list[list[int]]] = [[]]
    for text in texts:
        if sum(map(len, shards[-1])) + len(text) > OPTIONS["shard_tokens"]:
            shards.append([])
        shards[-1].append(text)
    return [
        [shard[place] for place in batch]
        for shard in shards
        for batch in batches(list(map(len, shard)), OPTIONS["batch_tokens"])
    ]


def overhead(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Capture to disk, captures that are let go, and the model alone on the same batches."""
    lens, texts = Lens(llama_88m(vocab_size=VOCAB)), documents(tokens)
    lens.batches_safely(max(map(len, texts)))
    groups = shards_of(texts)

    @torch.no_grad()
    def plain() -> None:
        for group in groups:
            longest = max(map(len, group))
            ids = torch.tensor([text + [0] * (longest - len(text)) for text in group])
            mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in group])
            lens.model.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def capture() -> None:
        options = {"sites": ["resid_post"], "layers": LAYERS, "residual": None, "logits": None}
        for group in groups:
            for _ in lens.capture_many(group, batch_size=len(group), **options):
                pass

    def store() -> None:
        options = StoreOptions(**OPTIONS, threads=torch.get_num_threads())
        capture_corpus(lens, texts, folder / "overhead", options=options, overwrite=True)

    runs: dict[str, Callable[[], Any]] = {"model": plain, "captures": capture, "store": store}
    found = ratios(runs, rounds)
    found["tokens_per_second"] = {  # type: ignore[assignment]
        name: round(tokens / found[name]["seconds"]) for name in runs
    }
    return found


def loader(folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Shuffled tokens per second against reading the same files from front to back, both from the
    disk: the files leave the page cache before each run.
    """
    lens = Lens(llama_88m(vocab_size=VOCAB, layers=1))
    place = folder / "loader"
    options = StoreOptions(layers=(0,), dtype="bfloat16")
    store = capture_corpus(lens, documents(tokens), place, options=options)
    files = sorted(place.glob("shard-*"))
    buffer = bytearray(1 << 22)

    def leave_cache() -> None:
        for file in files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def sequential() -> None:
        leave_cache()
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def shuffled() -> None:
        leave_cache()
        for _ in store.iter_batches(4096, shuffle=0):
            pass

    def in_order() -> None:
        leave_cache()
        for _ in store.iter_batches(4096):
            pass

    found = ratios({"sequential": sequential, "shuffled": shuffled, "in_order": in_order}, rounds)
    seconds = found["shuffled"]["seconds"]
    speed = {"shuffled_tokens_per_second": round(tokens / seconds), "tokens": tokens}
    return {**found, **speed, "bytes": sum(file.stat().st_size for file in files)}


def workers(folder: Path, tokens: int, rounds: int, ray: bool) -> dict[str, Any]:
    """Seconds that shards take, without the start of workers: from the first to the last."""
    model = folder / "model"
    llama_88m(vocab_size=VOCAB).save_pretrained(model)
    texts = documents(tokens)
    found: dict[str, list[float]] = {}
    kinds: dict[str, dict[str, Any]] = {"one": {"workers": 1}, "two": {"workers": 2}}
    if ray:
        kinds["ray"] = {"ray": "local"}
    for _ in range(rounds):
        for name, how in kinds.items():
            marks: list[tuple[float, int]] = []

            def note(step: Any, marks: list[tuple[float, int]] = marks) -> None:
                marks.append((time.perf_counter(), step.done))

            options = StoreOptions(**{**OPTIONS, "shard_tokens": 2048})
            place = folder / name
            capture_corpus(
                str(model), texts, place, options=options, overwrite=True, progress=note, **how
            )
            (begin, before), (end, after) = marks[3], marks[-1]  # both workers are running by then
            found.setdefault(name, []).append((after - before) / (end - begin))
    speeds = {name: statistics.median(values) for name, values in found.items()}
    same = {name: sorted(file.read_bytes() for file in (folder / name).iterdir()) for name in kinds}
    return {
        "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "two_to_one": round(speeds["two"] / speeds["one"], 3),
        **({"ray_to_two": round(speeds["ray"] / speeds["two"], 3)} if ray else {}),
        "same_bytes": all(each == same["one"] for each in same.values()),
    }


def memory(folder: Path, tokens: int) -> dict[str, Any]:
    """Peak memory of a process that captures, and of one with ten times the documents."""
    peaks = []
    for times in (1, 10):
        command = [sys.executable, "-m", "benchmarks.store", "--peak", str(tokens * times)]
        done = subprocess.run(
            [*command, "--folder", folder / f"peak {times}"],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(folder / f"peak {times}")
    return {"peak_bytes": peaks, "ratio": round(peaks[1] / peaks[0], 4)}


def peak(folder: Path, tokens: int) -> int:
    """Capture and read one epoch; the most memory that this process had."""
    lens = Lens(llama_88m(vocab_size=VOCAB, layers=2))
    options = StoreOptions(dtype="bfloat16", shard_tokens=4096, batch_tokens=2048)
    capture_corpus(lens, documents(tokens), folder, options=options)
    for _ in open_store(folder).iter_batches(1024, shuffle=0, buffer_tokens=4096):
        pass
    return peak_bytes()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--ray", action="store_true", help="Ray beside local workers")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak is not None:
        print(peak(given.folder, given.peak))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "overhead": overhead(folder, given.tokens, given.rounds),
            "loader": loader(folder, 32 * given.tokens, given.rounds),  # eight buffers
            "workers": workers(folder, 2 * given.tokens, 1, given.ray),
            "memory": memory(folder, given.tokens // 2),
        }
    save("store", figures)


if __name__ == "__main__":
    main()
