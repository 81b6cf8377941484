"""What a mixed plan buys: perplexity on held-out text at 2.0, 2.5 and 3.0 bits per weight.

    python -m benchmarks.plan                       measure, write results/plan.json and the tables
    python -m benchmarks.plan --parts calibrated    some parts anew, the others as they were
    python -m benchmarks.plan --tables              the tables from the last results alone

For each demo model: costs are measured on text it was trained on, results on files it never saw.
Beside the plans stand uniform rules in the same compact storage, and the sensitivity of `exact` in
groups of 128 with the rank correlation of the cheap predictor. Plans with calibrated rules fit
these on twice the tokens that costs are measured on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, save
from benchmarks.pages import replace_tables, table
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.demo import DEMO_MODELS, demo_path
from trilens.demo.corpus import (
    heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.evaluation.reference import Degradation, ReferenceLogits
from trilens.io.safetensors_header import TensorHeader
from trilens.io.weight_files import read_headers
from trilens.lens.lens import Lens
from trilens.planning.calibrated_candidates import hessians_of, with_text
from trilens.planning.candidates import data_free, of_plan
from trilens.planning.matrices import find_matrices
from trilens.planning.planning import Candidates, choose_plan, price_candidates
from trilens.planning.result import Costs, Planned, PlanOptions
from trilens.planning.sensitivity import measure_sensitivity
from trilens.taps.parameters import swapped
from trilens.text.token_blocks import sample_blocks

PAGE = Path(__file__).parents[1] / "docs" / "sensitivity.md"
BUDGETS = (2.0, 2.5, 3.0)
REFERENCE = MatrixPlan("exact", group_size=128)
UNIFORM = (
    MatrixPlan("absmean", per="tensor"),
    MatrixPlan("exact", per="row"),
    REFERENCE,
    MatrixPlan("asymmetric", group_size=128),
    MatrixPlan("planes", group_size=128),
)
COST_TOKENS, HELD_OUT_TOKENS = 2048, 16384
COST_LENGTH, HELD_OUT_LENGTH = 256, 512
PLAN_PARTS = ("measured", "predicted", "calibrated")
PARTS = ("uniform", *PLAN_PARTS, "sensitivity")


@dataclass(frozen=True)
class Subject:
    """A demo model with text it was trained on and text it never saw."""

    name: str
    lens: Lens
    headers: dict[str, TensorHeader]
    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @classmethod
    def open(cls, name: str) -> Subject:
        folder = demo_path(name)
        root, record = stdlib_root(), load_heldout_record()
        return cls(
            name,
            Lens.from_pretrained(str(folder), dtype="float32"),
            read_headers(folder),
            tuple(document.text for document in training_documents(root, record)),
            tuple(document.text for document in heldout_documents(root, record)),
        )

    def cost_blocks(self, tokens: int = COST_TOKENS) -> tuple[Tensor, ...]:
        return sample_blocks(self.lens.tokenizer, self.seen, length=COST_LENGTH, tokens=tokens)

    def held_out(self, tokens: int = HELD_OUT_TOKENS) -> tuple[Tensor, ...]:
        return sample_blocks(
            self.lens.tokenizer, self.unseen, length=HELD_OUT_LENGTH, tokens=tokens
        )


def figures(damage: Degradation, bits: float) -> dict[str, float]:
    return {
        "bits_per_weight": round(bits, 4),
        "perplexity_ratio": round(damage.perplexity_ratio, 4),
        "log_ratio_nats": round(damage.nll_nats, 4),
        "kl_nats": round(damage.kl_nats, 4),
    }


def uniform(subject: Subject, entry: MatrixPlan, held_out: ReferenceLogits) -> dict[str, float]:
    lens = subject.lens
    candidate = of_plan(entry, scale_dtype="float16", storage="compact")
    matrices = find_matrices(lens, subject.headers)
    own = {m.target: lens.model.get_parameter(m.target).detach() for m in matrices}
    with swapped(lens.model, {m.target: candidate.apply(m, own[m.target]) for m in matrices}):
        damage = held_out.measure()
    size_bytes = sum(candidate.size_bytes(m) for m in matrices)
    return figures(damage, 8 * size_bytes / sum(m.n_weights for m in matrices))


def plans(
    subject: Subject,
    blocks: Sequence[Tensor],
    held: Sequence[Tensor],
    *,
    costs: Costs = "measured",
    budgets: Sequence[float] = BUDGETS,
    **pricing: Any,
) -> dict[float, Planned]:
    """The plan of each budget, priced once; further options as of `price_candidates`."""
    options = PlanOptions(budget_bits=budgets[0], costs=costs)
    prices = price_candidates(
        subject.lens, blocks, options=options, headers=subject.headers, **pricing
    )
    return {
        budget: choose_plan(
            subject.lens, prices, held, options=replace(options, budget_bits=budget)
        )
        for budget in budgets
    }


def measure(name: str, parts: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """The parts of one model that are asked, the others as they are known."""
    subject = Subject.open(name)
    blocks, held = subject.cost_blocks(), subject.held_out()
    held_out = ReferenceLogits(subject.lens, held)
    result: dict[str, Any] = {"plan": {}, "cpu_seconds": {}, **known}
    result["held_out_tokens"] = held_out.n_tokens
    result["perplexity"] = round(math.exp(held_out.nll_nats), 4)
    if "uniform" in parts:
        result["uniform"] = {entry.label: uniform(subject, entry, held_out) for entry in UNIFORM}
    base = result["uniform"][REFERENCE.label]["log_ratio_nats"]
    for kind in (part for part in PLAN_PARTS if part in parts):
        start = time.process_time()
        costs: Costs = "predicted" if kind == "predicted" else "measured"
        candidates: Candidates = data_free
        if kind == "calibrated":
            matrices = find_matrices(subject.lens, subject.headers)
            text = subject.cost_blocks(2 * COST_TOKENS)
            candidates = with_text(hessians_of(subject.lens, matrices, text))
        found = plans(subject, blocks, held, costs=costs, candidates=candidates)
        for budget, planned in found.items():
            row: dict[str, Any] = figures(planned.damage, planned.bits_per_weight)
            row["times_closer_than_exact_g128"] = round(base / planned.damage.nll_nats, 2)
            print(name, kind, budget, row, flush=True)
            row["choices"] = {choice.name: choice.choice for choice in planned.choices}
            result["plan"][f"{kind} {budget}"] = row
        result["cpu_seconds"][kind] = round(time.process_time() - start, 1)
    if "sensitivity" in parts:
        ranks = measure_sensitivity(
            subject.lens, blocks, rule=REFERENCE, headers=subject.headers, each_matrix=True
        )
        result["sensitivity"] = ranks.to_dict()
        result["sensitivity"].pop("checksum")
    return result


def figures_table(results: dict[str, Any]) -> str:
    """Uniform rules and plans of every model: ratio of perplexities and bits of each."""
    models = results["models"]
    labels = [entry.label for entry in UNIFORM]
    rows = [
        (f"`{label}` everywhere", *(_cell(model["uniform"][label]) for model in models.values()))
        for label in labels
    ]
    words = {
        "measured": "costs measured",
        "predicted": "costs predicted",
        "calibrated": "with calibrated rules",
    }
    for kind in PLAN_PARTS:
        for budget in BUDGETS:
            cells = [_cell(model["plan"][f"{kind} {budget}"]) for model in models.values()]
            rows.append((f"plan of {budget} bits, {words[kind]}", *cells))
    return table(("", *models), rows)


def trust_table(results: dict[str, Any]) -> str:
    """Spearman's rank correlation of predicted and measured KL."""
    rows = []
    for name, model in results["models"].items():
        found = model["sensitivity"]["rank_correlation"]
        rows.append((name, *(f"{found[s]:.2f}" for s in ("block", "blocks", "kind", "matrix"))))
    return table(("", "blocks alone", "blocks 0 … i", "kinds", "matrices"), rows)


def _cell(row: dict[str, float]) -> str:
    return f"{row['perplexity_ratio']:.2f} ({row['bits_per_weight']:.2f} bits)"


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed plans of the demo models.")
    parser.add_argument("--tables", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    file = RESULTS / "plan.json"
    if not options.tables:
        torch.set_num_threads(1)
        whole = len(options.parts) == len(PARTS)
        known = {} if whole else json.loads(file.read_text(encoding="utf-8"))["models"]
        models = {name: measure(name, options.parts, known.get(name, {})) for name in DEMO_MODELS}
        save("plan", {"models": models})
    results = json.loads(file.read_text(encoding="utf-8"))
    replace_tables(PAGE, {"figures": figures_table(results), "trust": trust_table(results)})


if __name__ == "__main__":
    main()
