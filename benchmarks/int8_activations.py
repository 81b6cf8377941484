"""What activations of 8 bits change: perplexity of the demo model, and the time of one layer.

    python -m benchmarks.int8_activations

Held-out text of the demo model, float32 before and after; one layer of 4096 × 4096 in bfloat16, one
thread, processor time, medians of five interleaved rounds.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import ratios, save
from trilens import quantize_activations
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.demo import demo_path
from trilens.demo.corpus import checked_heldout_documents
from trilens.evaluation.perplexity import measure_perplexity
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.quantize import PerLayerQuant
from trilens.text.token_blocks import token_blocks

PLANS = {
    "absmean, per tensor": TernaryPlan("absmean"),
    "exact, groups of 128": TernaryPlan("exact", group_size=128),
    "planes, groups of 128": TernaryPlan("planes", group_size=128),
    "planes, groups of 128, rotated": TernaryPlan("planes", group_size=128, rotate=True),
}
WIDTH = 4096
KINDS: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "groups of 128": {"rule": "exact", "group_size": 128},
}


def perplexities() -> dict[str, Any]:
    """Of each plan, with inputs as they come and rounded."""
    documents = [document.text for document in checked_heldout_documents()]
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    blocks = token_blocks(tokenizer, documents, length=512, limit_tokens=1 << 14)
    found = {}
    for name, plan in PLANS.items():
        with tempfile.TemporaryDirectory() as root:
            ternarize(demo_path(), Path(root) / "out", plan=plan)
            model = AutoModelForCausalLM.from_pretrained(f"{root}/out", dtype=torch.float32)
            plain = measure_perplexity(model, blocks)
            quantize_activations(model)
            rounded = measure_perplexity(model, blocks)
        found[name] = {
            "perplexity": round(plain.value, 4),
            "with_8_bits": round(rounded.value, 4),
            "ratio": round(math.exp(rounded.nll_nats - plain.nll_nats), 5),
        }
        print(name, found[name], flush=True)
    return found


def times() -> dict[str, Any]:
    """How many times as fast one layer is with rounded inputs."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, options in KINDS.items():
        quant = PerLayerQuant.quantize(torch.randn(WIDTH, WIDTH), "w", **options)
        plain, rounded = (TernaryLinear.from_quant(quant) for _ in range(2))
        quantize_activations(rounded)
        found[name] = {}
        for batch in (1, 4, 16, 64, 512):
            x = torch.randn(batch, WIDTH).bfloat16()
            runs: dict[str, Callable[[], Any]] = {
                "plain": partial(plain, x),
                "8 bits": partial(rounded, x),
            }
            compared = ratios(runs, 5, time.process_time)
            found[name][f"{batch} inputs, times as fast"] = round(
                1 / compared["8 bits"]["ratio"], 2
            )
    return found


def main() -> None:
    """Measure and keep."""
    with torch.no_grad():
        save("int8_activations", {"perplexity": perplexities(), "layer": times()})


if __name__ == "__main__":
    main()
