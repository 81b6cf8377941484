"""What effective attention costs, against the forward pass of a model of that size.

12 layers, 2,048 tokens, random weights and inputs, float32. Three kinds of recurrence, each against
the forward pass of a model with that mixer, in turns:

    delta    vector decay and removal keys, 12 heads × 64      RWKV-7, width 768
    scalar   scalar decay, 24 heads × 128 states, one group    Mamba-2, width 768
    channel  1,536 channels × 16 states, mean over channels    Mamba, width 768

    row      attention from the last token, every head of every layer
    column   attention to the first token, every head of every layer

The figure to reach: a row of all layers in half the time of the forward pass. Figures are medians
over the rounds. `python -m benchmarks.effective_attention --json` keeps the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize, softplus
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from benchmarks.common import main_of_kinds, paired, peak_memory
from trilens.caches.attention import AttentionCache
from trilens.caches.patterns.channel.pattern import ChannelPattern
from trilens.caches.patterns.protocol import Pattern
from trilens.caches.patterns.recurrent.pattern import RecurrentPattern
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.model import RWKV7ForCausalLM


def delta(seq: int) -> Pattern:
    r, k, key = (torch.randn(1, 12, seq, 64) for _ in range(3))
    log_w = -0.6065 * torch.sigmoid(torch.randn(1, 12, seq, 64))
    key = normalize(key, dim=-1)
    rate = torch.sigmoid(torch.randn(1, 12, seq, 64))
    return RecurrentPattern(r, k, log_w=log_w, a=-key, b=key * rate)


def scalar(seq: int) -> Pattern:
    c, b = torch.randn(1, 1, seq, 128), torch.randn(1, 1, seq, 128)
    dt = softplus(torch.randn(1, 24, seq) - 3)
    log_w = -dt * torch.arange(1, 25)[:, None]
    return RecurrentPattern(c, b, log_w=log_w[..., None], k_scale=dt)


def channel(seq: int) -> Pattern:
    step = softplus(torch.randn(1, seq, 1536) - 3)
    rate = -torch.arange(1.0, 17).expand(1536, 16)
    return ChannelPattern(
        step=step, rate=rate, q=torch.randn(1, seq, 16), k=torch.randn(1, seq, 16)
    )


def model(kind: str, layers: int) -> Any:
    size = {"hidden_size": 768, "num_hidden_layers": layers, "vocab_size": 4096}
    if kind == "delta":
        return RWKV7ForCausalLM(RWKV7Config(**size))
    if kind == "scalar":
        config = Mamba2Config(**size, num_heads=24, head_dim=64, state_size=128, n_groups=1)
        return Mamba2ForCausalLM(config)
    return MambaForCausalLM(MambaConfig(**size, state_size=16))


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    make: dict[str, Callable[[int], Pattern]] = {
        "delta": delta,
        "scalar": scalar,
        "channel": channel,
    }
    patterns = {layer: make[kind](options.tokens) for layer in range(options.layers)}
    cache = AttentionCache.from_layers(patterns, n_model_layers=options.layers)
    network = model(kind, options.layers).eval()
    ids = torch.randint(0, 4096, (1, options.tokens))

    def row() -> None:
        for layer in cache.layers:
            cache.attention_from_position(layer, -1)

    def column() -> None:
        for layer in cache.layers:
            cache.attention_to_position(layer, 0)

    runs = {"forward": lambda: network(ids, use_cache=False), "row": row, "column": column}
    with peak_memory() as memory:
        row()
    seconds = paired(runs, options.rounds)
    return {
        "parameters_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 1),
        "forward_s": round(seconds["forward"], 3),
        "row_s": round(seconds["row"], 3),
        "column_s": round(seconds["column"], 3),
        "row_of_forward": round(seconds["row"] / seconds["forward"], 4),
        "row_extra_mib": round(memory.extra_bytes / 2**20, 1),
    }


if __name__ == "__main__":
    main_of_kinds(__doc__ or "", "effective_attention", measure)
