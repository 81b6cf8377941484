"""What a patching sweep costs: against as many plain forward passes as it has batches.

An 88M-parameter Llama with random weights, 64 tokens, batches of 16: every layer and every eighth
token of resid_pre, and every head of attn.z. `python -m benchmarks.patching`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import llama_88m, plain_pass, ratios, save
from trilens import Lens, attribution_patch, patch_sweep

TOKENS = 64
BATCH = 16
ROUNDS = 3


def metric(logits: torch.Tensor) -> torch.Tensor:
    """The difference of two logits after the last token."""
    return logits[-1, 5] - logits[-1, 9]


def main() -> None:
    """Measure and keep."""
    model = llama_88m()
    clean = torch.randint(0, 4096, (TOKENS,), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[TOKENS // 2] = 7
    lens = Lens(model)
    batch = corrupted.repeat(BATCH, 1)
    plain = plain_pass(model, batch)
    positions = list(range(0, TOKENS, 8))
    layers = model.config.num_hidden_layers
    sweeps: dict[str, tuple[int, Callable[[], Any]]] = {
        "layer × position": (
            layers * len(positions),
            lambda: patch_sweep(
                lens, clean, corrupted, metric, positions=positions, batch_size=BATCH
            ),
        ),
        "layer × head": (
            layers * model.config.num_attention_heads,
            lambda: patch_sweep(
                lens, clean, corrupted, metric, site="attn.z", by="head", batch_size=BATCH
            ),
        ),
    }
    results = {}
    for name, (points, sweep) in sweeps.items():
        passes = points // BATCH

        def forwards(passes: int = passes) -> None:
            for _ in range(passes):
                plain()

        found = ratios({"plain forwards": forwards, "sweep": sweep}, ROUNDS)
        results[name] = {"points": points, "forwards": passes, "runs": found}
    one = plain_pass(model, corrupted[None])
    estimate = ratios(
        {
            "plain forward": one,
            "attribution": lambda: attribution_patch(lens, clean, corrupted, metric),
        },
        ROUNDS,
    )
    save("patching", {"tokens": TOKENS, "batch": BATCH, "sweeps": results, "estimate": estimate})


if __name__ == "__main__":
    main()
