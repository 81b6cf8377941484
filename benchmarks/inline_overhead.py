"""What a capture costs where the model computes attention in its own code.

A Bloom (ALiBi, heads folded into the batch) and a GPT-J (rotary, scores in float32) of 88M
parameters with random weights, 512 tokens: one forward pass with residual, attention and gates
against the plain pass. What is kept per token is said too, and the weights that it stands for. Bare
hooks that hold the same tensors are the floor: what is held, the next layer cannot write over.

    python -m benchmarks.inline_overhead [--rounds N] [--cpu]
"""

from __future__ import annotations

import argparse
import time
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


def bare_hooks(model: PreTrainedModel, plain: Callable[[], Any]) -> Callable[[], Any]:
    """What a capture of residual and attention keeps, held by hand: nothing proven or followed."""
    names = ("query_key_value", "q_proj", "k_proj")
    kept = [module for name, module in model.named_modules() if name.endswith(names)]
    blocks = model.transformer.h

    def run() -> Any:
        held: list[Any] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            held.append(output)

        def last(_module: Any, _args: Any, output: Any) -> None:
            held.append((output[0] if isinstance(output, tuple) else output)[:, -1].clone())

        handles = [module.register_forward_hook(keep) for module in kept]
        handles += [block.register_forward_hook(last) for block in blocks]
        try:
            return plain(), held
        finally:
            for handle in handles:
                handle.remove()

    return run


def measure(
    model: PreTrainedModel, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """The ratios of one model, and the bytes that its capture keeps."""
    ids = torch.randint(0, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)
    gated = bool(lens.gate_layers)
    plain = plain_pass(model, ids)
    runs: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "bare hooks": bare_hooks(model, plain),
        "trilens": lambda: lens.capture(ids, residual="last", attention=True, gates=gated),
        "trilens, residual": lambda: lens.capture(ids, residual="last"),
    }
    attention = lens.capture(ids, attention=True).attention
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "attention_bytes": attention.nbytes,
        "weights_bytes": sum(attention[layer].dense_bytes for layer in attention.layers),
        "runs": ratios(runs, rounds, clock),
    }


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cpu", action="store_true", help="seconds of this process, one thread")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    if options.cpu:
        torch.set_num_threads(1)
    models = {"Bloom": bloom_88m(), "GPT-J": gptj_88m()}
    found = {name: measure(model, options.rounds, clock) for name, model in models.items()}
    setting = {"tokens": TOKENS, "rounds": options.rounds, "clock": clock.__name__}
    save("inline_overhead", {**setting, "models": found})


if __name__ == "__main__":
    main()
