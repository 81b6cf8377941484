"""What capturing gates costs: one forward pass with gates kept, against the plain pass.

A Llama and a Mamba of equal width and depth with random weights, float32, each against its own
plain pass, in turns within a round. The figure to reach: 1.10 of the plain pass.

    python -m benchmarks.gate_overhead [--tokens N] [--layers N] [--width N] [--rounds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from benchmarks.common import llama_config, plain_pass, ratios, save
from trilens import Lens

VOCAB = 4096


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """Heads of 64, an MLP of 8/3 the width."""
    options = {"vocab_size": VOCAB, "tie_word_embeddings": True}
    config = llama_config(width, width * 8 // 3, layers, width // 64, **options)
    return LlamaForCausalLM(config).eval()


def mamba(width: int, layers: int) -> MambaForCausalLM:
    """Twice the width inside, 16 states per channel."""
    config = MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=VOCAB)
    return MambaForCausalLM(config).eval()


def measure(model: Any, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Ratios to the plain pass, round by round."""
    ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)

    runs: dict[str, Callable[[], Any]] = {
        "plain": plain_pass(model, ids),
        "gates": lambda: lens.capture(ids, residual=None, gates=True),
        "nothing": lambda: lens.capture(ids, residual=None),
    }
    return ratios(runs, rounds)


def main() -> None:
    """Measure both and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {
        make.__name__: measure(make(options.width, options.layers), options.tokens, options.rounds)
        for make in (llama, mamba)
    }
    save("gate_overhead", {"setting": vars(options), "results": results})


if __name__ == "__main__":
    main()
