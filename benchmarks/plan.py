"""What a mixed plan buys: perplexity on held-out text at 2.0, 2.5 and 3.0 bits per weight.

    python -m benchmarks.plan

Costs are measured on text the demo model was trained on, results on the files it never saw. Beside
the plans stand uniform rules in the same compact storage, and the sensitivity table of `exact` in
groups of 128 with the rank correlation of the cheap predictor. Writes results/plan.json.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import save
from trilens.analysis.candidates import of_plan
from trilens.analysis.damage import Damage, Yardstick
from trilens.analysis.matrices import find_matrices
from trilens.analysis.plan_result import PlanOptions
from trilens.analysis.planning import choose_plan, price_candidates
from trilens.analysis.sampling import sample_blocks
from trilens.analysis.sensitivity import measure_sensitivity
from trilens.analysis.swap import swapped
from trilens.checkpoint.matrix_plan import MatrixPlan
from trilens.demo import demo_path
from trilens.demo.corpus import (
    heldout_documents,
    load_heldout_record,
    stdlib_root,
    training_documents,
)
from trilens.lens import Lens
from trilens.models.weights import read_headers

BUDGETS = (2.0, 2.5, 3.0)
UNIFORM = (
    MatrixPlan("absmean", per="tensor"),
    MatrixPlan("exact", per="row"),
    MatrixPlan("exact", group_size=128),
    MatrixPlan("asymmetric", group_size=128),
    MatrixPlan("planes", group_size=128),
)
COST_TOKENS, HELD_OUT_TOKENS = 2048, 16384


def figures(damage: Damage, bits: float) -> dict[str, float]:
    return {
        "bits_per_weight": round(bits, 4),
        "perplexity_ratio": round(damage.perplexity_ratio, 4),
        "log_ratio_nats": round(damage.nll_nats, 4),
        "kl_nats": round(damage.kl_nats, 4),
    }


def uniform(lens: Lens, entry: MatrixPlan, judge: Yardstick, headers: Any) -> dict[str, float]:
    candidate = of_plan(entry, scale_dtype="float16", storage="compact")
    matrices = find_matrices(lens, headers)
    own = {m.target: lens.model.get_parameter(m.target).detach() for m in matrices}
    with swapped(lens.model, {m.target: candidate.apply(m, own[m.target]) for m in matrices}):
        damage = judge.measure()
    size_bytes = sum(candidate.size_bytes(m) for m in matrices)
    return figures(damage, 8 * size_bytes / sum(m.n_weights for m in matrices))


def main() -> None:
    torch.set_num_threads(1)
    folder = demo_path("transformer")
    lens = Lens.from_pretrained(str(folder), dtype="float32")
    headers = read_headers(folder)
    root, record = stdlib_root(), load_heldout_record()
    seen = [document.text for document in training_documents(root, record)]
    unseen = [document.text for document in heldout_documents(root, record)]
    blocks = sample_blocks(lens.tokenizer, seen, length=256, tokens=COST_TOKENS)
    held = sample_blocks(lens.tokenizer, unseen, length=512, tokens=HELD_OUT_TOKENS)
    judge = Yardstick(lens, held)
    result: dict[str, Any] = {
        "held_out_tokens": judge.n_tokens,
        "perplexity": round(math.exp(judge.nll_nats), 4),
        "uniform": {e.label: uniform(lens, e, judge, headers) for e in UNIFORM},
        "plan": {},
    }
    base = result["uniform"]["exact g128"]["log_ratio_nats"]
    for costs in ("measured", "predicted"):
        start = time.process_time()
        options = PlanOptions(budget_bits=BUDGETS[0], costs=costs)
        prices = price_candidates(lens, blocks, options=options, headers=headers)
        result["cpu_seconds"] = {
            **result.get("cpu_seconds", {}),
            costs: round(time.process_time() - start, 1),
        }
        for budget in BUDGETS:
            asked = replace(options, budget_bits=budget)
            planned = choose_plan(lens, prices, held, options=asked)
            row: dict[str, Any] = figures(planned.damage, planned.bits_per_weight)
            row["times_closer_than_exact_g128"] = round(base / planned.damage.nll_nats, 2)
            row["choices"] = {choice.name: choice.choice for choice in planned.choices}
            result["plan"][f"{costs} {budget}"] = row
            print(costs, budget, {k: v for k, v in row.items() if k != "choices"}, flush=True)
    found = measure_sensitivity(
        lens, blocks, rule=MatrixPlan("exact", group_size=128), headers=headers, each_matrix=True
    )
    result["sensitivity"] = found.to_dict()
    result["sensitivity"].pop("checksum")
    save("plan", result)


if __name__ == "__main__":
    main()
