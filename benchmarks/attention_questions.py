"""What the questions about attention cost, against the attention itself.

Random q and k of 12 layers × 12 heads × 4,096 tokens (width 64, float32). In one run, in turns:

    attention   one causal F.scaled_dot_product_attention per layer
    row         attention_from_position of the last token, every layer
    top-k       top_attended_positions of the last token, every layer
    column      attention_to_position of the first token, every layer (log-sum-exp included)
    entropy     entropy of every head of every layer
    all three   row, column, top-k and entropy, from nothing
    moments     mean_distance and received of every layer (log-sum-exp included)
    masked      entropy under a sliding-window mask of 512 tokens, every layer
    idle mask   entropy under a boolean mask that is plainly causal, every layer

Ratios are medians over the rounds, run in turn. `--forward` adds one forward pass of an
88M-parameter Llama. `python -m benchmarks.attention_questions --json` keeps the result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import llama_88m, peak_memory, save
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern


def caches(layers: list[tuple[Tensor, Tensor]], **options: Any) -> AttentionCache:
    patterns = {
        layer: SoftmaxPattern(q, k, scaling=q.shape[-1] ** -0.5, **options)
        for layer, (q, k) in enumerate(layers)
    }
    return AttentionCache.from_layers(patterns, n_model_layers=len(layers))


def subjects(layers: list[tuple[Tensor, Tensor]], seq: int) -> dict[str, Callable[[], object]]:
    i, j = torch.arange(seq)[:, None], torch.arange(seq)[None]
    idle = (j <= i)[None, None]
    window = ((j <= i) & (j > i - 512))[None, None]

    def attention() -> None:
        for q, k in layers:
            F.scaled_dot_product_attention(q, k, k, is_causal=True)

    def each(cache: AttentionCache, *questions: Callable[[AttentionCache, int], object]) -> None:
        for layer in cache.layers:
            for question in questions:
                question(cache, layer)

    def row(cache: AttentionCache, layer: int) -> object:
        return cache.attention_from_position(layer, -1)

    def top(cache: AttentionCache, layer: int) -> object:
        return cache.top_attended_positions(layer, -1, 10)

    def column(cache: AttentionCache, layer: int) -> object:
        return cache.attention_to_position(layer, 0)

    return {
        "attention": attention,
        "row": lambda: each(caches(layers, causal=True), row),
        "top-k": lambda: each(caches(layers, causal=True), top),
        "column": lambda: each(caches(layers, causal=True), column),
        "entropy": lambda: each(caches(layers, causal=True), AttentionCache.entropy),
        "all three": lambda: each(
            caches(layers, causal=True), row, column, top, AttentionCache.entropy
        ),
        "moments": lambda: each(
            caches(layers, causal=True), AttentionCache.mean_distance, AttentionCache.received
        ),
        "idle mask": lambda: each(caches(layers, mask=idle), AttentionCache.entropy),
        "masked": lambda: each(caches(layers, mask=window), AttentionCache.entropy),
    }


def measure(todo: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    extra: dict[str, int] = dict.fromkeys(todo, 0)
    for turn in range(rounds + 1):
        for name, run in todo.items():
            with peak_memory() as memory:
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
            # The first turn warms allocator and thread pool up; memory that the allocator keeps
            # afterwards is seen in it alone.
            extra[name] = max(extra[name], memory.extra_bytes)
            if turn:
                seconds[name].append(took)
    base = seconds["attention"]
    return {
        name: {
            "seconds": round(statistics.median(seconds[name]), 4),
            "ratio": round(
                statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)), 4
            ),
            "extra_mib": round(extra[name] / 2**20, 1),
        }
        for name in todo
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON, and keep it")
    parser.add_argument("--forward", action="store_true", help="add a Llama forward pass")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = [
        (torch.randn(1, 12, options.tokens, 64), torch.randn(1, 12, options.tokens, 64))
        for _ in range(options.layers)
    ]
    with torch.no_grad():
        todo = subjects(layers, options.tokens)
        if options.forward:
            model = llama_88m(options.tokens)
            ids = torch.randint(0, 4096, (1, options.tokens))
            todo["llama forward"] = lambda: model(ids, use_cache=False)
        results = measure(todo, options.rounds)
    if options.json:
        setting = {name: getattr(options, name) for name in ("tokens", "layers", "rounds")}
        save("attention_questions", {"setting": setting, "results": results})
        return
    print(f"{'':14}{'seconds':>10}{'ratio':>8}{'extra MiB':>11}")
    for name, result in results.items():
        print(
            f"{name:14}{result['seconds']:10.3f}{result['ratio']:8.3f}{result['extra_mib']:11.1f}"
        )


if __name__ == "__main__":
    main()
