"""What a capture costs where the model computes attention in its own code.

A Bloom (ALiBi, heads folded into the batch) and a GPT-J (rotary, scores in float32) of 88M
parameters with random weights, 512 tokens: one forward pass with residual, attention and gates
against the plain pass. What is kept per token is said too, and the weights that it stands for.

    python -m benchmarks.inline_overhead [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedModel,
)

from benchmarks.common import plain_pass, ratios, save
from trilens import Lens

TOKENS = 512
ROUNDS = 15
VOCAB = 4096


def bloom_88m() -> PreTrainedModel:
    """12 layers × 12 heads, width 768."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=768, n_layer=12, n_head=12)
    return BloomForCausalLM(config).eval()


def gptj_88m() -> PreTrainedModel:
    """12 layers × 12 heads, width 768; rotary over half of each head."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=VOCAB, n_positions=2048, n_embd=768, n_layer=12, n_head=12, rotary_dim=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    return GPTJForCausalLM(config).eval()


def measure(model: PreTrainedModel, rounds: int) -> dict[str, Any]:
    """The ratios of one model, and the bytes that its capture keeps."""
    ids = torch.randint(0, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)
    runs: dict[str, Callable[[], Any]] = {
        "plain": plain_pass(model, ids),
        "trilens": lambda: lens.capture(ids, residual="last", attention=True, gates=gated),
        "trilens, residual": lambda: lens.capture(ids, residual="last"),
    }
    gated = bool(lens.gate_layers)
    attention = lens.capture(ids, attention=True).attention
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "attention_bytes": attention.nbytes,
        "weights_bytes": sum(attention[layer].dense_bytes for layer in attention.layers),
        "runs": ratios(runs, rounds),
    }


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    models = {"Bloom": bloom_88m(), "GPT-J": gptj_88m()}
    found = {name: measure(model, rounds) for name, model in models.items()}
    save("inline_overhead", {"tokens": TOKENS, "rounds": rounds, "models": found})


if __name__ == "__main__":
    main()
