"""What each step of the calibrated rules brings on the demo transformer, and what `gptq` costs.

Quality: perplexity over the dense model's on the demo's held-out text, all block linears ternary,
groups of 128, mean over calibration seeds; the text is the demo's training text. Cost: `gptq` on a
4096 × 4096 matrix, in units of a float32 product of two such matrices in the same process.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import paired, peak_bytes, save
from trilens.checkpoint import Calibration, TernaryPlan
from trilens.checkpoint.calibration.fit import FitOptions
from trilens.checkpoint.calibration.run import run_calibration
from trilens.checkpoint.pipeline import calibration_source
from trilens.demo import demo_path
from trilens.demo.corpus import (
    heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.ternary.calibrated import CALIBRATED_RULES, CalibratedRule, calibrate
from trilens.ternary.hessian import Hessian, Moments

BEST = CALIBRATED_RULES["best"]
STEPS: dict[str, CalibratedRule | None] = {
    "exact, no text": None,
    "gptq": CALIBRATED_RULES["gptq"],
    "+ scales and trits in turns": replace(
        BEST, corrected=False, repairs_residual=False, fits_block=False
    ),
    "+ dense outputs as the target": replace(BEST, repairs_residual=False, fits_block=False),
    "+ the residual stream as the target": replace(BEST, fits_block=False),
    "+ norms, biases, scales fitted": BEST,
}


def calibration(seed: int, tokens: int, evaluation_tokens: int) -> Calibration:
    """Training text to calibrate on, held-out text to measure on."""
    root, record = stdlib_root(), load_heldout_record()
    return Calibration(
        tuple(document.text for document in training_documents(root, record)),
        tuple(document.text for document in heldout_documents(root, record)),
        tokens=tokens,
        evaluation_tokens=evaluation_tokens,
        seed=seed,
    )


def ratio_of(
    rule: CalibratedRule | None, planes: int, options: Calibration, fit: FitOptions | None = None
) -> tuple[float, float]:
    """Ratio of perplexities, and processor seconds."""
    start = "exact" if planes == 1 else "planes"
    plan = TernaryPlan(start, group_size=128)
    if rule is not None:
        rule = replace(rule, start=start)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        _, damage = run_calibration(
            calibration_source(demo_path("transformer"), plan),
            plan,
            options,
            Path(folder),
            rule=rule,
            fit=fit,
        )
    return damage.ratio, time.process_time() - begun


def quality(seeds: int, tokens: int, evaluation_tokens: int) -> dict[str, Any]:
    """Every step, one and two planes; the first and the last calibrated rule with all seeds."""
    found: dict[str, Any] = {}
    for planes in (1, 2):
        for name, rule in STEPS.items():
            runs = [
                ratio_of(rule, planes, calibration(seed, tokens, evaluation_tokens))
                for seed in range(seeds if rule in (CALIBRATED_RULES["gptq"], BEST) else 1)
            ]
            ratios = [ratio for ratio, _ in runs]
            entry = {
                "ratio": round(math.exp(statistics.fmean(map(math.log, ratios))), 4),
                "ratios": [round(ratio, 4) for ratio in ratios],
                "processor_seconds": round(statistics.median(s for _, s in runs), 1),
            }
            found[f"{planes} plane{'s' * (planes > 1)}: {name}"] = entry
            print(planes, name, entry, flush=True)
        logs = [
            math.log(found[f"{planes} plane{'s' * (planes > 1)}: {name}"]["ratio"])
            for name in ("gptq", "+ norms, biases, scales fitted")
        ]
        found[f"share of gptq's log-ratio that best closes, planes {planes}"] = round(
            1 - logs[1] / logs[0], 3
        )
    return found


def cost(size: int) -> dict[str, Any]:
    """`gptq` on one matrix, in units of a matrix product."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator)
    x = (torch.randn(2 * size, size, generator=generator) @ a / size**0.5).double()
    moments = Moments.of(a.numpy(), Hessian((x.T @ x).numpy(), len(x)))
    del x
    weights = a.numpy().astype(np.float32)
    seconds = paired(
        {
            "product": lambda: a @ a,
            "gptq": lambda: calibrate(weights, "w", moments, rule="gptq", group_size=128),
        },
        3,
    )
    return {
        "size": size,
        "product_seconds": round(seconds["product"], 3),
        "gptq_seconds": round(seconds["gptq"], 3),
        "gptq_in_products": round(seconds["gptq"] / seconds["product"], 2),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--evaluation-tokens", type=int, default=32_768)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    figures: dict[str, Any] = {"settings": vars(options)}
    figures["quality"] = quality(options.seeds, options.tokens, options.evaluation_tokens)
    save("calibrated", figures)
    figures["gptq"] = cost(options.size)
    save("calibrated", figures)


if __name__ == "__main__":
    main()
