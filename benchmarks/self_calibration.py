"""Calibration on the model's own text, beside real text of one kind and none: three demo models.

Ratio of perplexities (ternary over dense) on three kinds of held-out text: Python modules, their
docstrings, and this project's pages. Real text is the demo's training text, of the first kind. All
block linears ternary, groups of 128. What is known so far is kept after each run.
"""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save
from trilens.checkpoint import Calibration, Sample, TernaryPlan
from trilens.checkpoint.calibration.effort import Effort, find_effort
from trilens.checkpoint.calibration.own_text import OwnText
from trilens.checkpoint.calibration.run import run_calibration
from trilens.checkpoint.format.damage import Damage
from trilens.checkpoint.job import read_job
from trilens.demo import demo_path
from trilens.demo.corpus import (
    heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.ternary.calibrated.rules import CALIBRATED_RULES

MODELS = ("transformer", "mamba", "rwkv7")
TEXTS = ("none", "real", "self", "both")
PAGES = Path(__file__).parent.parent / "docs"
_EVALUATION_TOKENS = 8_192


def kinds() -> tuple[Sample, ...]:
    """Three kinds of text that no demo model was trained on."""
    held_out = heldout_documents(stdlib_root(), load_heldout_record())
    modules = tuple(document.text for document in held_out)
    prose = tuple("\n\n".join(docstrings(text)) for text in modules)
    pages = tuple(path.read_text("utf-8") for path in sorted(PAGES.glob("*.md")))
    return (
        Sample("modules", modules),
        Sample("docstrings", tuple(text for text in prose if text.strip())),
        Sample("pages", pages),
    )


def docstrings(source: str) -> Iterator[str]:
    """Of a module, its classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield found


def calibration(
    text: str, tokens: int, evaluation_tokens: int, seed: int, own: OwnText | None = None
) -> Calibration:
    """On real text, the model's own, or half of each; for "none" nothing is calibrated."""
    real: tuple[str, ...] = ()
    if text != "self":
        training = training_documents(stdlib_root(), load_heldout_record())
        real = tuple(document.text for document in training)
    return Calibration(
        real,
        kinds(),
        tokens=256 if text == "none" else tokens,
        evaluation_tokens=evaluation_tokens,
        seed=seed,
        own_text=(own or OwnText()) if text in {"self", "both"} else None,
    )


def measured(
    model: str, rule: str, options: Calibration, effort: Effort, *, rotate: bool
) -> tuple[Damage, dict[str, Any]]:
    """The damage, what all blocks together gained, and seconds by the clock and the processor."""
    plan = TernaryPlan(rule, group_size=128, rotate=rotate)  # type: ignore[arg-type]
    began, worked = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        store, damage = run_calibration(
            read_job(demo_path(model), plan),
            options,
            Path(folder),
            rule=CALIBRATED_RULES.get(rule),
            fit=effort.seeded(options.seed),
        )
    whole = store.whole
    found: dict[str, Any] = {
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
    }
    if whole is not None:
        found["kl_nats"] = [round(whole.kl_nats_before, 5), round(whole.kl_nats, 5)]
        found["trit_changes"] = whole.trit_changes
    return damage, found


def main() -> None:
    """Measure what is asked for, and keep it beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--texts", nargs="+", default=["none", "real", "self"], choices=TEXTS)
    parser.add_argument("--rule", default="gptq", choices=list(CALIBRATED_RULES))
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--effort", default="default", choices=["fast", "default", "max"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--evaluation-tokens", type=int, default=_EVALUATION_TOKENS)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", nargs="+", default=[], help="what rows of own text begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fit", nargs="+", default=[], metavar="NAME=N", help="whole numbers of FitOptions"
    )
    given = parser.parse_args()
    own = OwnText(given.temperature, tuple(given.prompts))
    numbers = {name: int(number) for name, number in (text.split("=") for text in given.fit)}
    last = RESULTS / "self_calibration.json"
    figures: dict[str, Any] = json.loads(last.read_text()) if last.is_file() else {}
    for model in given.models:
        for text in given.texts:
            rule = "exact" if text == "none" else given.rule
            options = calibration(text, given.tokens, given.evaluation_tokens, given.seed, own)
            effort = find_effort(given.effort)
            effort = replace(effort, fit=replace(effort.fit, **numbers))
            damage, spent = measured(model, rule, options, effort, rotate=given.rotate)
            words = [model, rule, text, *(["rotated"] if given.rotate else [])]
            words += [] if given.effort == "default" else [f"effort {given.effort}"]
            words += [] if text == "none" else [f"{given.tokens} tokens"]
            at_default = given.evaluation_tokens == _EVALUATION_TOKENS
            words += [] if at_default else [f"measured on {given.evaluation_tokens}"]
            words += [] if own.temperature == 1 else [f"temperature {own.temperature:g}"]
            words += [f"prompts {' '.join(own.prompts)!r}"] if own.prompts else []
            words += given.fit
            name = ", ".join([*words, f"seed {given.seed}"])
            ratios = {each.name: round(each.ratio, 4) for each in damage.texts}
            # Another run may have ended meanwhile.
            figures = json.loads(last.read_text()) if last.is_file() else {}
            figures[name] = {"ratios": ratios, "worst": round(damage.ratio, 4), **spent}
            save("self_calibration", figures)


if __name__ == "__main__":
    main()
