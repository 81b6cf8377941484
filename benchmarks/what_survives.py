"""What survives of the three demo models when their weights become ternary, and what repairs it.

    python -m benchmarks.what_survives           measure, write results/what_survives.json and the
                                                 tables of docs/what-survives.md
    python -m benchmarks.what_survives --tables  write the tables from the last results alone
    … --models mamba --parts rules plans         measure these anew, keep the rest
    … --parts rules --rules planes asymmetric    of the rules, measure these anew

All text but the one that costs and calibrations are made on is held out. Of every variant a real
ternary checkpoint is written, loaded again and compared with the source. The page's words are
written by hand: only what stands between two marks is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.common import RESULTS, save
from benchmarks.plan import Subject, plans
from benchmarks.what_survives_page import write_page
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.run import CompareOptions, compare
from trilens.checkpoint import Calibration, TernaryPlan, ternarize
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.demo import DEMO_MODELS, demo_path
from trilens.errors import AnatomyError
from trilens.evaluation.reference import Degradation, ReferenceLogits
from trilens.lens.lens import Lens
from trilens.planning.matrices import find_matrices
from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity, measure_sensitivity
from trilens.planning.sensitivity import Subject as SubjectName
from trilens.ternary.calibrated.rules import CALIBRATED_RULES
from trilens.ternary.rules.rules import RULES
from trilens.text.token_blocks import sample_blocks

BROKEN = MatrixPlan("absmean", per="tensor")
"""The rule whose damage is looked at part by part."""

SCALES: dict[str, dict[str, Any]] = {
    "tensor": {"per": "tensor"},
    "row": {"per": "row"},
    "g128": {"group_size": 128},
}
CALIBRATED_SCALES = ("g128",)
STORED: dict[str, Any] = {"storage": "compact", "scale_dtype": "float16"}
ROLES = ("previous_token", "duplicate_token", "induction")


@dataclass(frozen=True)
class Sizes:
    """Tokens of each measurement, and the length of their blocks.

    Attributes:
        outside: for perplexity and KL.
        inside: for what a comparison looks at inside.
        parts: for each part of the model alone.
        costs: for the prices of a plan.
        calibration: for calibrated rules.
        length: of a block.
    """

    outside: int = 8192
    inside: int = 2048
    parts: int = 2048
    costs: int = 2048
    calibration: int = 8192
    length: int = 128


SIZES = {
    "transformer": Sizes(),
    # Its scan runs step by step without a GPU, and its attention is one of 512 channels.
    "mamba": Sizes(outside=4096, inside=256, parts=1024, costs=1024),
    "rwkv7": Sizes(),
}


@dataclass(frozen=True)
class Bench:
    """A model, its texts, and what the unchanged model says about them."""

    subject: Subject
    folder: Path
    sizes: Sizes
    inside: tuple[Tensor, ...]
    outside: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    reference: ReferenceLogits

    @classmethod
    def of(cls, subject: Subject, folder: Path, sizes: Sizes) -> Bench:
        def blocks(documents: Sequence[str], tokens: int) -> tuple[Tensor, ...]:
            return sample_blocks(
                subject.lens.tokenizer, documents, length=sizes.length, tokens=tokens
            )

        outside = blocks(subject.unseen, sizes.outside)
        inside = blocks(subject.unseen, sizes.inside)
        parts = blocks(subject.unseen, sizes.parts)
        reference = ReferenceLogits(subject.lens, outside)
        return cls(subject, folder, sizes, inside, outside, parts, reference)

    def costs(self) -> tuple[Tensor, ...]:
        return sample_blocks(
            self.subject.lens.tokenizer,
            self.subject.seen,
            length=self.sizes.length,
            tokens=self.sizes.costs,
        )

    def calibration(self) -> Calibration:
        return Calibration(
            self.subject.seen,
            self.subject.unseen,
            tokens=self.sizes.calibration,
            evaluation_tokens=self.sizes.length * 4,
            length=self.sizes.length,
        )


@dataclass(frozen=True)
class Variant:
    """A ternary copy: what it takes, how far it is off outside, and the comparison inside."""

    bits_per_weight: float
    damage: Degradation
    comparison: Comparison


def variant(bench: Bench, plan: TernaryPlan, *, lens: Literal["all", "none"] = "none") -> Variant:
    """Write a ternary checkpoint, load it and compare it with its source."""
    calibration = bench.calibration() if plan.rule in CALIBRATED_RULES else None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ternary"
        report = ternarize(bench.folder, out, plan=plan, calibration=calibration)
        after = Lens.from_pretrained(str(out), dtype="float32")
        options = CompareOptions(lens=lens, batch_size=16)
        found = compare(bench.subject.lens, after, bench.inside, options=options)
        damage = bench.reference.measure(after)
    matrices = [tensor for tensor in report.tensors if tensor.is_matrix and can_be_coded(tensor)]
    n_weights = sum(tensor.n_weights for tensor in matrices)
    bits = 8 * sum(tensor.size_bytes for tensor in matrices) / n_weights
    return Variant(bits, damage, found)


def can_be_coded(tensor: Any) -> bool:
    """Whether it was coded, or not quantized for no other reason than the plan's."""
    return bool(tensor.outcome != "kept" or tensor.reason == "the plan keeps it")


def summary(found: Variant) -> dict[str, float]:
    """One row: outside, and the mean over layers, heads and gates inside."""
    inside = found.comparison
    cosines = [row.after for row in inside.select("cosine", module="resid_post")]
    lost = [change for change in inside.role_changes if change.lost]
    return {
        "bits_per_weight": round(found.bits_per_weight, 3),
        "perplexity_ratio": rounded(found.damage.perplexity_ratio),
        "kl_nats": rounded(found.damage.kl_nats),
        "cosine": rounded(mean(cosines)),
        "cosine_last_layer": rounded(cosines[-1]),
        "js_nats": rounded(mean(row.after for row in inside.select("js_nats"))),
        "openness_abs_change": rounded(
            mean(row.after for row in inside.select("openness_abs_change"))
        ),
        "roles_lost": len(lost),
    }


def layers(parts: Sensitivity, found: Comparison) -> list[dict[str, Any]]:
    """The residual stream and the attention after each layer, and the layer's own damage."""
    together = {row.name: row for row in parts.of("blocks")}
    settled = {row.layer: row for row in found.select("settled")}
    rows = []
    for block in parts.of("block"):
        layer = int(block.name)
        rows.append(
            {
                "layer": layer,
                "alone_kl_nats": rounded(block.kl_nats),
                "predicted_kl_nats": rounded(block.predicted_kl_nats or 0.0),
                "together_kl_nats": rounded(together[block.name].kl_nats),
                "cosine": rounded(found.select("cosine", layer=layer)[0].after),
                "relative_error": rounded(found.select("relative_error", layer=layer)[0].after),
                "js_nats": rounded(mean(row.after for row in found.select("js_nats", layer=layer))),
                "settled_before": rounded(settled[layer].before),
                "settled_after": rounded(settled[layer].after),
            }
        )
    return rows


def kinds(parts: Sensitivity) -> list[dict[str, Any]]:
    """What each kind of matrix costs alone, the most sensitive first."""
    n_weights = sum(row.n_weights for row in parts.of("kind"))
    return [
        {
            "kind": row.name,
            "share_of_weights": rounded(row.n_weights / n_weights),
            "output_error": rounded(row.output_error),
            "kl_nats": rounded(row.kl_nats),
            "predicted_kl_nats": rounded(row.predicted_kl_nats or 0.0),
        }
        for row in parts.ranked("kind")
    ]


def matrices(parts: Sensitivity) -> list[dict[str, Any]]:
    """What each matrix costs alone, the most sensitive first."""
    return [
        {
            "matrix": row.name.removesuffix(".weight"),
            "output_error": rounded(row.output_error),
            "kl_nats": rounded(row.kl_nats),
            "predicted_kl_nats": rounded(row.predicted_kl_nats or 0.0),
        }
        for row in parts.ranked("matrix")
    ]


def heads(found: Comparison) -> list[dict[str, Any]]:
    """Every head, the most changed first, with what it did before and does after."""
    rows = []
    for row in found.select("js_nats"):
        place: dict[str, Any] = {
            "layer": row.layer,
            "head": row.head,
            "js_nats": rounded(row.after),
        }
        for metric in ("entropy_nats", "distance_tokens", *(f"{role}_score" for role in ROLES)):
            same = [r for r in found.select(metric, layer=row.layer) if r.head == row.head]
            for r in same:
                place[f"{metric}_before"] = rounded(r.before)
                place[f"{metric}_after"] = rounded(r.after)
        rows.append(place)
    return sorted(rows, key=lambda row: -row["js_nats"])


def gates(found: Comparison) -> list[dict[str, Any]]:
    """Every gate of every layer."""
    rows = []
    for row in found.select("openness"):
        at = {"layer": row.layer, "module": row.module}
        values: dict[str, Any] = {
            "gate": row.module,
            "layer": row.layer,
            "units": found.arrays[f"openness.{row.layer}.{row.module}"].tensor.shape[-1],
            "openness_before": rounded(row.before),
            "openness_after": rounded(row.after),
        }
        for metric in ("openness_abs_change", "newly_dead", "newly_saturated"):
            values[metric] = rounded(found.select(metric, **at)[0].after)
        for horizon in found.select("horizon_tokens", **at):
            values["horizon_before"] = rounded(horizon.before)
            values["horizon_after"] = rounded(horizon.after)
        rows.append(values)
    return rows


def ternary(names: Iterable[str]) -> list[str]:
    """The rules with three levels: what this page is about."""
    return [name for name in names if not name.endswith("quad")]


def rules(bench: Bench, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Rules of the two registries, all where none are named, with every scale each is tried at."""
    found: dict[str, Any] = {}
    for rule in names or ternary((*RULES, *CALIBRATED_RULES)):
        for name in CALIBRATED_SCALES if rule in CALIBRATED_RULES else SCALES:
            start = time.process_time()
            plan = TernaryPlan(rule=rule, **SCALES[name], **STORED)  # type: ignore[arg-type]
            try:
                found[f"{rule} {name}"] = summary(variant(bench, plan))
            except AnatomyError as cause:  # calibration needs blocks that run one by one
                found[f"{rule} {name}"] = {"refused": str(cause)}
            seconds = time.process_time() - start
            print(bench.subject.name, rule, name, f"{seconds:.1f} s", flush=True)
    return found


def budgets(bench: Bench) -> dict[str, Any]:
    """What a plan buys at each budget, and which matrices it spends most on."""
    found = {}
    made = plans(bench.subject, bench.costs(), bench.outside)
    for budget, planned in made.items():
        row: dict[str, Any] = summary(variant(bench, planned.plan))
        row["bits_by_kind"] = bits_by_kind(bench, planned)
        row["choices"] = {choice.name: choice.choice for choice in planned.choices}
        found[f"{budget:.1f}"] = row
        print(bench.subject.name, "plan", budget, row["perplexity_ratio"], flush=True)
    return found


def bits_by_kind(bench: Bench, planned: Planned) -> dict[str, float]:
    """Mean bits of the matrices of each kind, most first."""
    kind_of = {m.target: m.kind for m in find_matrices(bench.subject.lens, bench.subject.headers)}
    seen: dict[str, list[float]] = {}
    for choice in planned.choices:
        seen.setdefault(kind_of[choice.name], []).append(choice.bits_per_weight)
    means = {kind: round(mean(bits), 2) for kind, bits in seen.items()}
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))


def broken(bench: Bench) -> dict[str, Any]:
    """What `BROKEN` does to every part of the model."""
    found = variant(bench, TernaryPlan("absmean", per="tensor", **STORED), lens="all").comparison
    settle = found.select("settle_layer")[0]
    parts = measure_sensitivity(
        bench.subject.lens,
        bench.parts,
        rule=BROKEN,
        headers=bench.subject.headers,
        each_matrix=True,
    )
    subjects: tuple[SubjectName, ...] = ("block", "blocks", "kind", "matrix")
    return {
        "tokens": asdict(bench.sizes),
        "held_out_tokens": bench.reference.n_tokens,
        "inside_tokens": found.n_tokens,
        "perplexity": rounded(math.exp(bench.reference.nll_nats)),
        "layers": layers(parts, found),
        "kinds": kinds(parts),
        "matrices": matrices(parts),
        "rank_correlation": {subject: parts.rank_correlation(subject) for subject in subjects},
        "heads": heads(found),
        "roles": [asdict(change) for change in found.role_changes],
        "gates": gates(found),
        "settle_layer": {"before": rounded(settle.before), "after": rounded(settle.after)},
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "broken": broken,
    "rules": lambda bench: {"rules": rules(bench)},
    "plans": lambda bench: {"plans": budgets(bench)},
}


def measure(bench: Bench, parts: Iterable[str] = tuple(PARTS)) -> dict[str, Any]:
    """Everything about one model, or the parts that are named."""
    found: dict[str, Any] = {}
    for part in parts:
        start = time.process_time()
        found |= PARTS[part](bench)
        found[f"{part}_cpu_seconds"] = round(time.process_time() - start, 1)
    return found


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def rounded(value: float) -> float:
    """Four digits, or four decimals where that is more."""
    return float(f"{value:.4g}") if abs(value) >= 1 else round(value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--models", nargs="*", choices=DEMO_MODELS, default=DEMO_MODELS)
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument(
        "--rules", nargs="*", choices=(*RULES, *CALIBRATED_RULES), help="of the part of that name"
    )
    given = parser.parse_args()
    file = RESULTS / "what_survives.json"
    found = json.loads(file.read_text(encoding="utf-8"))["models"] if file.is_file() else {}
    torch.set_num_threads(1)
    for name in () if given.tables else given.models:
        bench = Bench.of(Subject.open(name), demo_path(name), SIZES[name])
        for part in given.parts:
            known = found.get(name, {})
            if part == "rules" and given.rules:
                rows = known["rules"] | rules(bench, given.rules)
                found[name] = {**known, "rules": rows}
            else:
                found[name] = {**known, **measure(bench, [part])}
            save("what_survives", {"models": {n: found[n] for n in DEMO_MODELS if n in found}})
    write_page(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
