"""What the benchmarks share: a model to time, medians, peak memory, results on disk."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

__all__ = [
    "PeakMemory",
    "llama_88m",
    "llama_config",
    "main_of_kinds",
    "paired",
    "peak_bytes",
    "peak_memory",
    "plain_pass",
    "ratios",
    "save",
]

RESULTS = Path(__file__).parent / "results"


def llama_config(
    width: int, inner: int, layers: int, heads: int, kv_heads: int | None = None, **options: Any
) -> LlamaConfig:
    """A Llama's sizes; as many key-value heads as heads unless given."""
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, **options,
    )  # fmt: skip


def llama_88m(positions: int = 4096, vocab_size: int = 4096, layers: int = 12) -> LlamaForCausalLM:
    """An 88M-parameter Llama with random weights: 12 layers × 12 heads, width 768.

    A larger vocabulary than 4096 adds 768 parameters for each token, a layer 7 million.
    """
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": positions}
    config = llama_config(768, 2048, layers, 12, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def plain_pass(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The model's own forward pass, which captures are compared with."""

    def run() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return run


def main_of_kinds(
    description: str, name: str, measure: Callable[[str, argparse.Namespace], dict[str, Any]]
) -> None:
    """The command line of a benchmark that measures recurrent layers kind by kind."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="save the result")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["delta", "scalar", "channel"])
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        results = {kind: measure(kind, options) for kind in options.kinds}
    if options.json:
        setting = {key: getattr(options, key) for key in ("tokens", "layers", "rounds")}
        save(name, {"setting": setting, "results": results})
        return
    for kind, result in results.items():
        print(kind, result)


def _rounds(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round that is not counted."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def add_running(
    runs: dict[str, Callable[[], Any]], peers: dict[str, Callable[[], Any]]
) -> dict[str, str]:
    """Add the peers' runs that end to ours; the others' errors by name."""
    missing = {}
    for name, run in peers.items():
        try:
            run()
            runs[name] = run
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return missing


def ratios(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Run all in turn, round by round, and compare each with the first of its own round.

    `time.process_time` as the clock counts this process alone, where the machine is shared.

    Returns:
        Per name the median seconds, and median, lowest and highest ratio to the first of the runs.
        A ratio within one round is free of the machine's drift.
    """
    seconds = _rounds(runs, rounds, clock)
    first = next(iter(seconds.values()))
    found = {}
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values, first, strict=True))
        found[name] = {
            "seconds": round(statistics.median(values), 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(ratios[0], 3),
            "ratio_max": round(ratios[-1], 3),
        }
    return found


def paired(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn so that the machine's drift hits all alike."""
    seconds = _rounds(runs, rounds)
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory:
    """The highest resident memory seen, in bytes above the start."""

    extra_bytes = 0


@contextmanager
def peak_memory(read: Callable[[], int] | None = None) -> Iterator[PeakMemory]:
    """Sample memory every two milliseconds while the block runs.

    Args:
        read: bytes in use now; resident memory where not given.
    """
    gc.collect()
    process = psutil.Process()
    now = read or (lambda: process.memory_info().rss)
    base = now()
    peak, stop = PeakMemory(), threading.Event()

    def sample() -> None:
        while not stop.is_set():
            peak.extra_bytes = max(peak.extra_bytes, now() - base)
            stop.wait(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def peak_bytes() -> int:
    """The most resident memory that this program has had.

    Not getrusage's: that one remembers the parent's peak across fork and exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system has no VmHWM in /proc/self/status")


def save(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them as the last result."""
    record = {
        **figures,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: figures}, indent=1), flush=True)
