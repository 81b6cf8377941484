"""What a comparison costs: all questions to two models, against two reference forward passes.

An 88M-parameter Llama with random weights and 32,000 tokens (9 layers × 12 heads, width 768), and
a copy of it with noise on every weight; 64 prompts of 256 tokens.

`--rounds N` makes a shorter run, `--prompts N` a smaller one, whose result is not kept. What the
lens costs is measured on an eighth of the prompts.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.common import llama_88m, peak_memory, ratios, save
from trilens import CompareOptions, Lens, compare

PROMPTS, TOKENS, ROUNDS = 64, 256, 3
BATCH = CompareOptions().batch_size


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The model, and one derived from it."""
    before = llama_88m(positions=1024, vocab_size=32_000, layers=9)
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return before, after


def main() -> None:
    """Measure, and keep a whole run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    pair = models()
    lenses = [Lens(model) for model in pair]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 32_000, (chosen.prompts, TOKENS), generator=generator)

    few = prompts[: max(BATCH, chosen.prompts // 8)]

    def plain(some: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for batch in some.split(BATCH):
                    for model in pair:
                        model(input_ids=batch, use_cache=False)

        return run

    def asked(which: Any, some: torch.Tensor = prompts) -> Callable[[], Any]:
        options = CompareOptions(lens=which)
        return lambda: compare(lenses[0], lenses[1], iter(some), options=options)

    runs = {"two plain passes": plain(prompts), "compare": asked("last")}
    lens_runs = {
        "two plain passes": plain(few),
        "compare": asked("last", few),
        "compare, no lens": asked("none", few),
        "compare, lens at all positions": asked("all", few),
    }
    memory = {}
    for n in (max(1, chosen.prompts // 4), chosen.prompts):
        asked("last", prompts[:BATCH])()
        with peak_memory() as peak:
            asked("last", prompts[:n])()
        memory[str(n)] = round(peak.extra_bytes / 1e6)
    figures = {
        "parameters": sum(p.numel() for p in pair[0].parameters()),
        "prompts": chosen.prompts,
        "tokens": TOKENS,
        "batch_size": BATCH,
        "rounds": chosen.rounds,
        "runs": ratios(runs, chosen.rounds),
        f"runs of {len(few)} prompts": ratios(lens_runs, chosen.rounds),
        "peak_extra_mb_by_prompts": memory,
    }
    if chosen.prompts == PROMPTS:
        save("compare", figures)
    else:
        print(figures)


if __name__ == "__main__":
    main()
