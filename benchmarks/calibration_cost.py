"""What `gptq` and `best` cost on the demo transformer, beside the least that the work could take.

The floor: the passes that no order of the work can do without, 2·weights·tokens operations each, at
the rate of a float32 product that is timed in the same round. `gptq` needs the dense model's
residual stream and the ternary model's: two forward passes. `best` fits besides: a pass of a fit
over the text is one forward and one backward pass, three times a forward. Processor time of one
thread, so that other work on the machine counts little; rounds alternate.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.calibrated import calibration
from benchmarks.common import RESULTS, save
from trilens.checkpoint import TernaryPlan
from trilens.checkpoint.calibration import coder, fit, pair, run
from trilens.checkpoint.calibration.fit import FitOptions
from trilens.checkpoint.calibration.run import run_calibration
from trilens.checkpoint.job import Job, read_job
from trilens.demo import demo_path
from trilens.ternary.calibrated import held_out, hessian, rules
from trilens.ternary.calibrated.rules import CALIBRATED_RULES

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "proof, text": ((run, "prove"), (run.BlockRunner, "__init__"), (run, "load_mapped")),
    "passes to see inputs": ((pair.BlockPair, "again"),),
    "residual streams": ((run._Run, "_write"),),
    "moments": ((hessian.MomentSums, "add"),),
    "dampings and coding": ((rules, "_code"),),
    "scales and trits in turns": ((rules, "refine"),),
    "rest of coding": ((coder, "calibrate"),),
    "output errors, held out": ((held_out.HeldOutError, "add"),),
    "fit of each block": ((fit._Task, "descend"),),
    "fit of all blocks": ((run, "fit_end_to_end"),),
    "damage": ((run, "measure_text"),),
}
"""Parts of the work, and the functions that do them; what one calls of another is the other's."""


def floor(job: Job, rule: str, tokens: int, evaluation_tokens: int) -> float:
    """Operations of the passes that the work cannot do without."""
    pairs = [(c, h) for c, h in job.pairs if c.storage != "kept"]
    blocks = sum(h.shape[0] * h.shape[1] for _, h in pairs)
    head = next(h.shape[0] * h.shape[1] for n, h in job.headers.items() if "embed_tokens" in n)
    forward = 2.0 * blocks
    total = 2 * forward * (tokens + evaluation_tokens) + 2 * 2.0 * head * evaluation_tokens
    if CALIBRATED_RULES[rule].fits_whole:
        options = FitOptions()
        total += 3 * forward * tokens * (options.passes + options.whole_passes)
        total += (1 + 3) * 2.0 * head * tokens * options.whole_passes
    return total


def rate() -> float:
    """Operations in a second of a float32 product, by processor time."""
    one = torch.ones(1024, 1024)
    one @ one
    seconds = []
    for _ in range(5):
        began = time.process_time()
        one @ one
        seconds.append(time.process_time() - began)
    return 2 * 1024**3 / min(seconds)


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Add up the processor seconds of each part, without what it calls of others."""
    running: list[str] = []
    last = [time.process_time()]

    def switch() -> None:
        now = time.process_time()
        part = running[-1] if running else "rest"
        spent[part] = spent.get(part, 0.0) + now - last[0]
        last[0] = now

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            switch()
            running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return call

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                function = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, timed(part, function)))
        yield
        switch()


def once(rule: str, tokens: int, evaluation_tokens: int, seed: int) -> dict[str, Any]:
    """One calibration: time, ratio to the floor, damage, profile."""
    plan = TernaryPlan(rule, group_size=128)  # type: ignore[arg-type]
    job = read_job(demo_path("transformer"), plan)
    options = calibration(seed, tokens, evaluation_tokens)
    spent: dict[str, float] = {}
    speed = rate()
    with tempfile.TemporaryDirectory() as folder, watched(spent):
        began = time.process_time()
        _, damage = run_calibration(job, options, Path(folder))
        seconds = time.process_time() - began
    speed = max(speed, rate())
    least = floor(job, rule, damage.calibration_tokens, evaluation_tokens) / speed
    return {
        "seconds": seconds,
        "floor_seconds": least,
        "times_the_floor": seconds / least,
        "gflops": speed / 1e9,
        "perplexity_ratio": damage.ratio,
        "parts": spent,
    }


def measure(rules_: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of every rule in turn; medians."""
    found: dict[str, list[dict[str, Any]]] = {rule: [] for rule in rules_}
    for number in range(options.rounds):
        for rule in rules_:
            result = once(rule, options.tokens, options.evaluation_tokens, options.seed)
            found[rule].append(result)
            print(number, rule, {k: v for k, v in result.items() if k != "parts"}, flush=True)
    return {rule: summary(results) for rule, results in found.items()}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the lowest and highest ratio."""
    ratios = sorted(result["times_the_floor"] for result in results)
    parts = {name for result in results for name in result["parts"]}
    middle = {
        part: statistics.median(result["parts"].get(part, 0.0) for result in results)
        for part in parts
    }
    return {
        **{
            key: round(statistics.median(result[key] for result in results), 3)
            for key in ("seconds", "floor_seconds", "times_the_floor", "gflops")
        },
        "lowest": round(ratios[0], 2),
        "highest": round(ratios[-1], 2),
        "perplexity_ratio": round(results[0]["perplexity_ratio"], 4),
        "parts_seconds": {k: round(v, 2) for k, v in sorted(middle.items(), key=lambda x: -x[1])},
    }


def main() -> None:
    """Measure and keep; rules that are not measured now keep their last figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=["gptq", "best"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    once("gptq", 1024, 512, 0)  # loads the compiled loops
    last = RESULTS / "calibration_cost.json"
    figures: dict[str, Any] = json.loads(last.read_text()) if last.is_file() else {}
    figures["settings"] = {
        "tokens": options.tokens,
        "evaluation_tokens": options.evaluation_tokens,
        "rounds": options.rounds,
    }
    save("calibration_cost", {**figures, **measure(options.rules, options)})


if __name__ == "__main__":
    main()
