"""Measures of a gate, a model, a text or a sweep as charts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from trilens.analysis.lenses.tuned_lens import TunedLens
from trilens.analysis.model_evaluation import ModelEvaluation
from trilens.analysis.path_patching import PathPatch
from trilens.checkpoint.calibration.cost import CalibrationCost
from trilens.models.families import FamilyTable
from trilens.models.mappings import MappingTable
from trilens.report.page import Chart, Section
from trilens.report.tables import Column, Table
from trilens.report.views.plain import plain_table
from trilens.report.words import four_digits, token_text
from trilens.statistics.gating import GatingStatistics
from trilens.text.alignment import Alignment

__all__ = [
    "alignment_sections",
    "cost_sections",
    "evaluation_sections",
    "family_sections",
    "gating_sections",
    "mapping_sections",
    "path_sections",
    "tuned_lens_sections",
]

_BINS = 40


def gating_sections(found: GatingStatistics) -> list[Section]:
    """The averages of a gate's units: dead, active, saturated."""
    average, threshold = found.avg_gate, found.threshold
    low, high = min(0.0, float(average.min())), max(1.0, float(average.max()))
    edges = np.linspace(low, high, _BINS + 1)
    groups = {
        "dead": average < threshold,
        "active": (average >= threshold) & (average <= 1 - threshold),
        "saturated": average > 1 - threshold,
    }
    counts = [np.histogram(average[units], edges)[0].tolist() for units in groups.values()]
    table = Table(
        (
            Column("from", unit="average", spell=four_digits),
            Column("to", spell=four_digits),
            *(Column(name, note="units") for name in groups),
        ),
        tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), *counts, strict=True)),
        title="units by their average",
        keys=2,
    )
    chart = Chart(
        kind="histogram", table=table, x="from", until="to", y=tuple(groups),
        marks=(threshold, 1 - threshold), width="full",
        words=f"Over {found.n_steps:,} tokens. Lines: dead below {threshold:g}, saturated above "
        f"{1 - threshold:g}.",
    )  # fmt: skip
    return [Section("Units", (chart, plain_table(found, "units")), name="units")]


def alignment_sections(found: Alignment) -> list[Section]:
    """Where each token of one prompt stands in the other."""
    rows = []
    for row in found.table():
        same, there = row["kind"] == "equal", row["other_position"]
        if row["position"] is None:
            continue
        rows.append(
            (
                row["position"],
                token_text(row["token"]),
                there if same else None,
                None if same else there,
                None if row["other_token"] is None else token_text(row["other_token"]),
            )
        )
    note = "position in the other prompt"
    table = Table(
        (
            Column("position"),
            Column("token", left=True),
            Column("equal", note=note),
            Column("replaced", note=f"{note}, of another token"),
            Column("other token", left=True),
        ),
        tuple(rows),
        title="position in the other prompt",
        keys=2,
    )
    chart = Chart(
        kind="lines", table=table, x="position", y=("equal", "replaced"), width="full",
        words="A gap is a token without a partner.",
    )  # fmt: skip
    return [Section("Alignment", (chart, plain_table(found, "all tokens")), name="alignment")]


def tuned_lens_sections(found: TunedLens) -> list[Section]:
    """What the maps leave unexplained, by layer."""
    table = plain_table(found, "unexplained share of the last layer's variance")
    names = ("held_out_error", "fitted_error", "untranslated_error")
    chart = Chart(
        kind="lines", table=table, x="layer", y=names, width="full",
        words="0 is exact, 1 no better than the mean; untranslated: the logit lens.",
    )  # fmt: skip
    words = (f"Fitted to {found.n_tokens:,} tokens, measured on {found.n_held_out:,} others.",)
    return [Section("Errors of the maps", (chart,), words, name="errors")]


def path_sections(found: PathPatch) -> list[Section]:
    """How far each receiver moved."""
    rows = tuple(
        (_place(site, layer, head), moved)
        for (site, layer, head), moved in zip(found.receivers, found.moved, strict=True)
    )
    note = "relative change of what it reads: ‖new − old‖ / ‖old‖"
    table = Table(
        (Column("receiver", left=True), Column("moved", note=note, spell=four_digits)),
        rows,
        title="how far each receiver moved",
    )
    chart = Chart(kind="bars", table=table, x="receiver", y=("moved",))
    words = (
        f"From {_place(*found.sender)}, {found.direction}"
        + (", MLPs between kept" if found.freeze_mlps else "")
        + f": metric {found.base:.4f} → {found.value:.4f}, {found.target:.4f} in the other run.",
    )
    return [Section("Receivers", (chart,), words, name="receivers")]


def _place(site: str, layer: int | None, head: int | None) -> str:
    at = "" if layer is None else f" layer {layer}"
    return f"{site}{at}" if head is None else f"{site}{at} head {head}"


def evaluation_sections(found: ModelEvaluation) -> list[Section]:
    """Perplexity of each text, beside another model its ratio and divergence, and the tasks."""
    sections = []
    if found.texts:
        table = plain_table(found, "texts", units={"kl_nats": "nats"})
        charts = {"perplexity": "perplexity"}
        if found.against is not None:
            charts |= {"ratio": f"perplexity, as a multiple of {found.against}'s"}
            if any(row["kl_nats"] is not None for row in found.table()):
                charts |= {"kl_nats": f"KL divergence from {found.against}"}
        drawn = (
            Chart(kind="bars", table=table, x="text", y=(name,), title=title)
            for name, title in charts.items()
        )
        sections.append(Section("Texts", (*drawn, table), name="texts"))
    if found.tasks:
        rows = tuple(
            (f"{task} {name}", value)
            for task, metrics in found.tasks.items()
            for name, value in metrics.items()
        )
        columns = (Column("metric", left=True), Column("value", spell="{:.4f}".format))
        tasks = Table(columns, rows, title="tasks")
        chart = Chart(kind="bars", table=tasks, x="metric", y=("value",))
        sections.append(Section("Tasks", (chart,), name="tasks"))
    return sections


def family_sections(found: FamilyTable) -> list[Section]:
    """How many types are captured how far, and each of them."""
    table = Table(
        (Column("outcome", left=True), Column("types")),
        tuple(found.count().items()),
        title="types of models, by what is captured",
    )
    words = "residual: attention, effective attention, gates or states of a layer are refused."
    chart = Chart(kind="bars", table=table, x="outcome", y=("types",), words=words)
    return [Section("Types", (chart, plain_table(found, "types")), name="types")]


def mapping_sections(found: MappingTable) -> list[Section]:
    """How many types of each mapping are captured how far."""
    counts = Counter((row.mapping, row.outcome) for row in found.rows)
    table = Table(
        (Column("mapping", left=True), Column("outcome", left=True), Column("types")),
        tuple((*key, n) for key, n in sorted(counts.items())),
        title="types of each mapping, by what is captured",
        keys=2,
    )
    chart = Chart(kind="heatmap", table=table, x="outcome", row="mapping", y=("types",))
    return [Section("Types", (chart, plain_table(found, "stacks")), name="types")]


def cost_sections(found: CalibrationCost) -> list[Section]:
    """The operations of each part of the work."""
    table = Table(
        (Column("part", left=True), Column("operations", unit="10⁹", spell=four_digits)),
        tuple((part, n / 1e9) for part, n in found.operations.items()),
        title="operations of each part",
    )
    chart = Chart(kind="bars", table=table, x="part", y=("operations",), width="full")
    return [Section("Cost", (chart,), name="cost")]
