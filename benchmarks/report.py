"""How large a report is and how long it takes: 144 random heads, the worst that compresses.

`python -m benchmarks.report`
"""

from __future__ import annotations

import time

import torch

from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.protocol import DensePattern
from trilens.report.html.render import render_page
from trilens.report.page import Heads, Page, Section
from trilens.report.patterns import head_patterns
from trilens.report.tables import Column, Table

LAYERS, HEADS = 12, 12


def random_attention(tokens: int) -> AttentionCache:
    """Causal patterns of random scores: no head has an order that could be left out."""
    torch.manual_seed(0)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = (2 * torch.randn(1, HEADS, tokens, tokens) for _ in range(LAYERS))
    layers = (DensePattern(s.masked_fill(hidden, -torch.inf).softmax(-1)) for s in scores)
    return AttentionCache.from_layers(dict(enumerate(layers)), n_model_layers=LAYERS)


def main() -> None:
    """Print a row for each length."""
    print("tokens   size (MB)   seconds   steps of weight   tokens of a cell")
    for tokens in (64, 256, 512, 1024):
        cache = random_attention(tokens)
        started = time.perf_counter()
        patterns = head_patterns(cache, "softmax", cache.layers)
        summary = Table((Column("head"),), tuple((i,) for i in range(patterns.n_heads)))
        section = Section("Attention", (Heads(patterns, summary),))
        names = tuple(f"token {i}" for i in range(tokens))
        html = render_page(Page(title="heads", sections=(section,), tokens=names), {"trilens": "0"})
        seconds = time.perf_counter() - started
        size = len(html.encode()) / 1e6
        print(
            f"{tokens:6}   {size:9.2f}   {seconds:7.2f}   {patterns.steps:15}   {patterns.pool:16}"
        )


if __name__ == "__main__":
    main()
