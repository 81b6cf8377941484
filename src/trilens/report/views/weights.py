"""Ternary weights, sensitivity and plans as charts."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

from trilens.checkpoint.format.report import TernaryReport
from trilens.checkpoint.gguf.report import GgufReport
from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity
from trilens.report.page import Block, Chart, Section
from trilens.report.tables import Column, Table
from trilens.report.views.histograms import histogram_section
from trilens.report.views.planning import plan_table, sensitivity_tables
from trilens.report.views.ternary import gguf_table, ternary_table

__all__ = ["gguf_sections", "plan_sections", "sensitivity_sections", "ternary_sections"]

_BLOCK = re.compile(r"\.(\d+)\.")


def _placed(name: str) -> tuple[int, str] | None:
    """Block and kind of a matrix; None for one outside the blocks."""
    found = _BLOCK.search(name)
    if found is None:
        return None
    return int(found[1]), name[found.end() :].removesuffix(".weight")


def _grid(table: Table, column: str, title: str) -> Chart | None:
    """A column of a table of matrices as block × kind."""
    at = [each.name for each in table.columns].index(column)
    rows = []
    for row in table.rows:
        place = _placed(row[0])
        if place is not None and row[at] is not None:
            rows.append((*place, row[at], row[0]))
    if not rows:
        return None
    columns = (
        Column("block"),
        Column("kind", left=True),
        table.columns[at],
        Column("matrix", left=True),
    )
    own = Table(columns, tuple(rows), title=title, keys=2)
    return Chart(kind="heatmap", table=own, x="block", row="kind", y=(column,))


def _grids(table: Table, names: dict[str, str]) -> tuple[Block, ...]:
    known = {each.name for each in table.columns}
    charts = (_grid(table, name, title) for name, title in names.items() if name in known)
    return tuple(chart for chart in charts if chart is not None)


def ternary_sections(report: TernaryReport) -> list[Section]:
    """Error, zeros and bits of each matrix; the weights of the worst."""
    table = ternary_table(report, scales=True)
    charts = _grids(
        table,
        {
            "relative_error": "relative error of the weights",
            "output_error": "output error on the text of the calibration",
            "output_error_held_out": "output error on held-out text",
            "scale": "scale, the median of a matrix's units",
            "zeros": "share of zeros",
            "bits_per_weight": "bits per weight",
        },
    )
    matrices = Section("Matrices", (*charts, table), name="matrices")
    histograms = histogram_section(report)
    return [matrices] if histograms is None else [matrices, histograms]


def gguf_sections(report: GgufReport) -> list[Section]:
    """Zeros and bits of each matrix, and what each type of tensor takes."""
    matrices = gguf_table(replace(report, tensors=tuple(
        tensor for tensor in report.tensors if len(tensor.shape) > 1
    )))  # fmt: skip
    charts = _grids(matrices, {"bits_per_weight": "bits per weight", "zeros": "share of zeros"})
    sizes: Counter[str] = Counter()
    for tensor in report.tensors:
        sizes[tensor.type] += tensor.size_bytes
    rows = tuple((name, size / 1e6) for name, size in sizes.most_common())
    types = Table(
        (Column("type", left=True), Column("size", unit="MB", spell="{:,.3f}".format)),
        rows,
        title="what each type of tensor takes",
    )
    bars = Chart(kind="bars", table=types, x="type", y=("size",))
    return [Section("Tensors", (*charts, bars, gguf_table(report)), name="tensors")]


def sensitivity_sections(found: Sensitivity) -> list[Section]:
    """What each part costs, the most sensitive first."""
    sections = []
    for subject, table in sensitivity_tables(found).items():
        blocks: list[Block] = [
            Chart(kind="bars", table=table, x="part", y=("kl_nats",), title="KL divergence")
        ]
        if subject == "matrix":
            blocks = [*_grids(table, {"kl_nats": "KL divergence by block and kind"})]
        if any(column.name == "predicted_kl_nats" for column in table.columns):
            words = "Predicted without running the model, against measured."
            blocks.append(
                Chart(kind="scatter", table=table, x="predicted_kl_nats", y=("kl_nats",),
                      label="part", title="predicted and measured", words=words)
            )  # fmt: skip
        title = table.title[0].upper() + table.title[1:]
        sections.append(Section(title, (*blocks, table), table.notes, name=subject))
    return sections


def plan_sections(planned: Planned) -> list[Section]:
    """Bits against damage of each matrix, and the chosen point."""
    table = plan_table(planned)
    damage = planned.damage
    point = Table(
        (
            Column("quantity", left=True),
            Column("value", spell="{:.4g}".format),
            Column("unit", left=True),
        ),
        (
            ("bits per weight, matrices of the blocks", planned.bits_per_weight, "bits"),
            ("perplexity ratio", damage.perplexity_ratio, ""),
            ("KL divergence", damage.kl_nats, "nats"),
            ("budget", planned.options.budget_bits, "bits"),
            ("maximum perplexity ratio", planned.options.max_perplexity_ratio, ""),
        ),
        title="the chosen plan",
    )
    scatter = Chart(
        kind="scatter",
        table=table,
        x="bits_per_weight",
        y=("cost_kl_nats",),
        label="matrix",
        title="bits and damage of each matrix",
        words="One point per matrix: what it takes, and the damage it was reckoned at.",
    )
    charts = _grids(
        table, {"bits_per_weight": "bits per weight", "cost_kl_nats": "KL of each matrix alone"}
    )
    curve = () if not planned.frontier else (_curve(planned),)
    return [Section("Plan", (point, *curve, scatter, *charts, table), name="plan")]


def _curve(planned: Planned) -> Chart:
    """Every plan from the smallest to the largest, and the chosen one among them."""
    cost = math.fsum(choice.cost_kl_nats for choice in planned.choices)
    rows = tuple((bits, nats, None) for bits, nats in planned.frontier)
    note = "sum of the KL that each matrix was reckoned at, alone"
    columns = (
        Column("bits per weight", spell="{:.3f}".format),
        Column("all plans", unit="nats", note=note, spell="{:.4f}".format),
        Column("this plan", unit="nats", note=note, spell="{:.4f}".format),
    )
    own = (planned.bits_per_weight, None, cost)
    table = Table(columns, (*rows, own), title="bits against damage")
    return Chart(
        kind="lines", table=table, x="bits_per_weight", y=("all_plans", "this_plan"), width="full",
        words="From the smallest plan to the largest, by the upgrade that saves most for a byte. "
        "The damage of this plan as a whole was measured: it stands above.",
    )  # fmt: skip
