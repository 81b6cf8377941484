"""What editing and capturing cost while text is generated, against transformers' own generate.

An 88M-parameter Llama with random weights, a prompt of 128 tokens, 32 new ones, greedily.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.common import llama_88m, ratios, save
from trilens import Lens
from trilens.edits import Steer

PROMPT = 128
NEW = 32
ROUNDS = 7


def main() -> None:
    """Measure and keep."""
    model = llama_88m()
    ids = torch.randint(0, 2048, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    lens = Lens(model)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    model.generation_config = GenerationConfig()
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    steer = Steer("resid_post", layers=6, vector=vector, scale=0.1, positions="generated")

    def generated(**options: Any) -> Callable[[], Any]:
        return lambda: lens.generate(ids, max_new_tokens=NEW, **options)

    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: model.generate(ids, generation_config=config),
        "lens.generate": generated(),
        "one steering edit": generated(edits=steer),
        "capture of residual": generated(capture={"residual": "all"}),
        "capture of residual and attention": generated(
            capture={"residual": "all", "attention": True}
        ),
        "capture of residual, attention and gates": generated(
            capture={"residual": "all", "attention": True, "gates": True}
        ),
        "edit and capture": generated(
            edits=steer, capture={"residual": "all", "attention": True, "gates": True}
        ),
    }
    figures = {"prompt": PROMPT, "new": NEW, "rounds": ROUNDS, "runs": ratios(runs, ROUNDS)}
    save("generation", figures)


if __name__ == "__main__":
    main()
