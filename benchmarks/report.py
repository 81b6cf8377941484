"""How large a report is and how long it takes: 144 heads of random weights, which compress worst.

`python -m benchmarks.report`: the heads alone, then the whole report of a model of 12 layers of 12
heads: with its layers, logit lens and gates. Processor time of one thread.
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trilens
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


def random_model() -> trilens.Lens:
    """A Llama of 12 layers of 12 heads, with weights so large that patterns are of many kinds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=2048,
        initializer_range=0.1,
    )  # fmt: skip
    return trilens.Lens(LlamaForCausalLM(config).eval())


def whole_reports() -> None:
    """Print a row for each length: capture apart, the report with all its views."""
    lens = random_model()
    print("\nwhole report of a model\ntokens   size (MB)   CPU (s)")
    for tokens in (64, 256, 512):
        ids = torch.randint(0, 2048, (tokens,), generator=torch.Generator().manual_seed(1))
        cap = lens.capture(ids, residual="all", attention=True, gates=True)
        started = time.process_time()
        html = trilens.make_report(cap, lens=lens).html
        seconds = time.process_time() - started
        print(f"{tokens:6}   {len(html.encode()) / 1e6:9.2f}   {seconds:7.2f}")


def main() -> None:
    """Print a row for each length."""
    torch.set_num_threads(1)
    print("tokens   size (MB)   CPU (s)   steps of weight   tokens of a cell")
    for tokens in (64, 256, 512, 1024):
        cache = random_attention(tokens)
        started = time.process_time()
        patterns = head_patterns(cache, "softmax", cache.layers)
        summary = Table((Column("head"),), tuple((i,) for i in range(patterns.n_heads)))
        section = Section("Attention", (Heads(patterns, summary),))
        names = tuple(f"token {i}" for i in range(tokens))
        html = render_page(Page(title="heads", sections=(section,), tokens=names), {"trilens": "0"})
        seconds = time.process_time() - started
        size = len(html.encode()) / 1e6
        print(
            f"{tokens:6}   {size:9.2f}   {seconds:7.2f}   {patterns.steps:15}   {patterns.pool:16}"
        )
    whole_reports()


if __name__ == "__main__":
    main()
