"""What each step of the calibrated rules brings on the demo transformer, and what `gptq` costs.

Quality: perplexity over the dense model's on the demo's held-out text, all block linears ternary,
groups of 128, mean over calibration seeds; the text is the demo's training text. Cost: `gptq` on a
4096 × 4096 matrix, in units of a float32 product of two such matrices in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoint import anonymous_bytes
from benchmarks.common import RESULTS, llama_88m, paired, peak_bytes, peak_memory, save
from trilens.checkpoint import Calibration, TernaryPlan
from trilens.checkpoint.calibration.fit import FitOptions
from trilens.checkpoint.calibration.run import run_calibration
from trilens.checkpoint.job import read_job
from trilens.demo import demo_path
from trilens.demo.corpus import (
    heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.ternary.calibrated.hessian import Hessian, Moments
from trilens.ternary.calibrated.rules import CALIBRATED_RULES, CalibratedRule, calibrate
from trilens.ternary.rules.rules import RuleName

BEST = CALIBRATED_RULES["best"]
WHOLE = "+ all blocks together"
STEPS: dict[str, CalibratedRule | None] = {
    "exact, no text": None,
    "gptq": CALIBRATED_RULES["gptq"],
    WHOLE: BEST,
    "+ scales and trits in turns": replace(
        BEST, corrected=False, repairs_residual=False, fits_block=False, fits_whole=False
    ),
    "+ dense outputs as the target": replace(
        BEST, repairs_residual=False, fits_block=False, fits_whole=False
    ),
    "+ the residual stream as the target": replace(BEST, fits_block=False, fits_whole=False),
    "+ norms, biases, scales of each block": replace(BEST, fits_whole=False),
}
FIRST = ("exact, no text", "gptq", WHOLE)
SEEDED = ROTATED = ("gptq", WHOLE)


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
    rule: CalibratedRule | None,
    planes: int,
    options: Calibration,
    fit: FitOptions | None = None,
    *,
    rotate: bool = False,
) -> tuple[float, float]:
    """Ratio of perplexities, and processor seconds."""
    start: RuleName = "exact" if planes == 1 else "planes"
    plan = TernaryPlan(start, group_size=128, rotate=rotate)
    if rule is not None:
        rule = replace(rule, start=start)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        _, damage = run_calibration(
            read_job(demo_path("transformer"), plan),
            options,
            Path(folder),
            rule=rule,
            fit=fit or FitOptions(seed=options.seed),
        )
    return damage.ratio, time.process_time() - begun


def runs(seeds: int) -> Iterator[tuple[str, CalibratedRule | None, int, bool, int]]:
    """What is measured, the most telling first: name, rule, planes, rotated, seed."""
    first = {name: STEPS[name] for name in FIRST}
    rest = {name: rule for name, rule in STEPS.items() if name not in FIRST}
    for planes, steps in ((1, first), (2, first), (1, rest), (2, rest)):
        for name, rule in steps.items():
            yield name, rule, planes, False, 0
    for planes in (1, 2):
        for name in ROTATED:
            yield f"{name}, rotated", STEPS[name], planes, True, 0
    for seed in range(1, seeds):
        for planes in (1, 2):
            for name in SEEDED:
                yield name, STEPS[name], planes, False, seed
        yield f"{WHOLE}, rotated", STEPS[WHOLE], 1, True, seed


def quality(
    seeds: int,
    tokens: int,
    evaluation_tokens: int,
    keep: Callable[[dict[str, Any]], None],
    only_planes: int | None = None,
) -> dict[str, Any]:
    """Every step, one and two planes or one of them; what is known is kept after each run."""
    ratios: dict[tuple[str, int], list[float]] = {}
    spent: dict[tuple[str, int], list[float]] = {}
    found: dict[str, Any] = {}
    for name, rule, planes, rotate, seed in runs(seeds):
        if only_planes not in {None, planes}:
            continue
        options = calibration(seed, tokens, evaluation_tokens)
        ratio, seconds = ratio_of(rule, planes, options, rotate=rotate)
        print(planes, name, seed, round(ratio, 4), round(seconds), flush=True)
        ratios.setdefault((name, planes), []).append(ratio)
        spent.setdefault((name, planes), []).append(seconds)
        found = summary(ratios, spent)
        keep(found)
    return found


def summary(
    ratios: dict[tuple[str, int], list[float]], spent: dict[tuple[str, int], list[float]]
) -> dict[str, Any]:
    """Means over seeds, and how much of the log-ratio that gptq leaves `best` closes."""
    found: dict[str, Any] = {}
    for (name, planes), values in ratios.items():
        found[f"{planes} plane{'s' * (planes > 1)}: {name}"] = {
            "ratio": round(math.exp(statistics.fmean(map(math.log, values))), 4),
            "ratios": [round(ratio, 4) for ratio in values],
            "processor_seconds": round(statistics.median(spent[(name, planes)]), 1),
        }
    for planes in (1, 2):
        pairs = zip(ratios.get(("gptq", planes), []), ratios.get((WHOLE, planes), []), strict=False)
        closed = [1 - math.log(best) / math.log(gptq) for gptq, best in pairs]
        if closed:
            found[f"share of gptq's log-ratio that best closes, planes {planes}"] = round(
                statistics.fmean(closed), 3
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


def memory(blocks: int, tokens: int) -> dict[str, Any]:
    """`gptq` on the 88M Llama with random weights: extra memory, and what the formula says."""
    model = llama_88m()
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    model.config.layer_types = None
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    width, wide = model.config.hidden_size, model.config.intermediate_size
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        model.to(torch.bfloat16).save_pretrained(source)
        del model
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_path("transformer") / name, source / name)
        plan = TernaryPlan("gptq", group_size=128)
        options = replace(calibration(0, tokens, 512), length=256, batch_size=4)
        run = read_job(source, plan)
        with peak_memory(anonymous_bytes) as peak:
            run_calibration(run, options, Path(folder) / "work")
    at_once = 4 * 256
    formula = 8 * block + 32 * wide**2 + 48 * wide * width + 4 * at_once * (10 * width + 3 * wide)
    return {
        "blocks": blocks,
        "weights_of_a_block": block,
        "formula_bytes": formula,
        "extra_bytes": peak.extra_bytes,
    }


def main() -> None:
    """Measure and keep; parts that are not measured now keep their last figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["cost", "memory", "quality"])
    parser.add_argument("--planes", type=int, choices=[1, 2], help="of the quality, these alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=3)
    options = parser.parse_args()
    last = RESULTS / "calibrated.json"
    figures: dict[str, Any] = json.loads(last.read_text()) if last.is_file() else {}

    def keep(part: str, found: dict[str, Any]) -> None:
        figures[part] = found
        save("calibrated", figures)

    if options.only in {None, "cost"}:
        keep("gptq", cost(options.size))
    if options.only in {None, "memory"}:
        memory(1, 2048)  # loads the compiled loops, whose memory is the same for any model
        keep("memory", memory(options.blocks, 2048))
    if options.only in {None, "quality"}:
        figures["settings"] = {
            "tokens": options.tokens,
            "evaluation_tokens": options.evaluation_tokens,
            "seeds": options.seeds,
        }
        older = figures.get("quality", {}) if options.planes else {}
        quality(
            options.seeds,
            options.tokens,
            options.evaluation_tokens,
            lambda found: keep("quality", {**older, **found}),
            options.planes,
        )


if __name__ == "__main__":
    main()
