"""A comparison as charts: what broke first, before and after, head by head."""

from __future__ import annotations

import numpy as np

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.rows import METRICS
from trilens.analysis.comparison.series import ComparisonSeries
from trilens.report.page import Block, Chart, Section
from trilens.report.tables import Better, Column, Table
from trilens.report.views.comparison import (
    RowIndex,
    change_gates,
    change_layers,
    mean_after,
    role_table,
)
from trilens.report.views.series import step_layers, step_table
from trilens.report.words import four_digits

__all__ = ["comparison_sections", "series_sections", "what_broke_first"]

_OUTPUT: dict[str, tuple[str, Better, str]] = {
    "perplexity": ("perplexity", "smaller", ""),
    "kl_nats_mean": ("KL divergence, mean", "smaller", "nats"),
    "kl_nats_median": ("KL divergence, median", "smaller", "nats"),
    "kl_nats_p99": ("KL divergence, 99th percentile", "smaller", "nats"),
    "kl_nats_max": ("KL divergence, largest", "smaller", "nats"),
    "same_top1": ("same top token", "larger", "share"),
    "same_top5": ("same tokens among the top five", "larger", "share"),
    "right_probability": ("probability of the target token", "larger", ""),
    "right_probability_rms_change": ("change of that probability (RMS)", "smaller", ""),
    "settle_layer": ("convergence layer", "", "layers"),
}
_LINES = (("cosine", "cosine"), ("relative_error", "relative error"))
_HEADS = {
    "entropy_nats": "entropy",
    "induction_score": "induction score",
    "previous_token_score": "previous-token score",
}
_BINS = 40


def comparison_sections(comparison: Comparison) -> list[Section]:
    """Output, layers, heads, gates and weights; what was not measured is left out."""
    index = RowIndex(comparison.rows)
    sections = [Section("Output", _output(index, comparison), name="output")]
    table = change_layers(index)
    sections.append(Section("Layer by layer", _layers(index, table), name="layers"))
    heads = _heads(index)
    if comparison.role_changes:
        heads += (role_table(comparison.role_changes),)
    if heads:
        words = (
            "Before, after and the change between them, head by head; the charts move together.",
        )
        sections.append(Section("Heads", heads, words, name="heads"))
    gates = change_gates(index, comparison.options["gate_threshold"])
    if gates is not None:
        sections.append(Section("Gates", (*_gates(gates), gates), name="gates"))
    return sections


def what_broke_first(comparison: Comparison) -> str:
    """Where the residual stream's error grows most, and which head changes most; "" if none."""
    index = RowIndex(comparison.rows)
    words = []
    errors = [
        (layer, mean_after(rows))
        for layer in index.layers
        if (rows := index.of("relative_error", layer))
    ]
    if errors and any(error for _, error in errors):
        first = next(layer for layer, error in errors if error)
        growth = [(error - before, layer) for (layer, error), before in
                  zip(errors, (0.0, *(e for _, e in errors)), strict=False)]  # fmt: skip
        most, layer = max(growth)
        words.append(
            f"The residual stream first differs after layer {first}; its error grows most in layer "
            f"{layer} (+{four_digits(most)})."
        )
    heads = [row for row in index.rows if row.metric == "js_nats" and row.head is not None]
    if heads and any(row.after for row in heads):
        worst = max(heads, key=lambda row: row.after)
        words.append(
            f"The head that changes most is {worst.head} of layer {worst.layer} "
            f"({four_digits(worst.after)} nats of Jensen–Shannon divergence)."
        )
    return " ".join(words)


def _output(index: RowIndex, comparison: Comparison) -> tuple[Block, ...]:
    rows = []
    for metric, (words, better, unit) in _OUTPUT.items():
        row = index.one(metric)
        if row is not None:
            good = f"{better} is better" if better else ""
            rows.append((words, row.before, row.after, row.delta, unit, good, METRICS[metric]))
    columns = (
        Column("quantity", left=True),
        Column("before", note="of a divergence: of the model from itself", spell=four_digits),
        Column("after", spell=four_digits),
        Column("change", spell=four_digits),
        Column("unit", left=True),
        Column("direction", left=True),
        Column("what it is", left=True),
    )
    blocks: list[Block] = [Table(columns, tuple(rows), title="output")]
    kl = comparison.arrays.get("token_kl_nats")
    if kl is not None and kl.tensor.numel():
        values = kl.tensor.float().cpu().numpy()
        values = values[np.isfinite(values)]
        if len(values) and values.max() > 0:
            counts, edges = np.histogram(values, _BINS, (0, float(values.max())))
            blocks.append(_kl_chart(counts.tolist(), edges.tolist()))
    return tuple(blocks)


def _kl_chart(counts: list[int], edges: list[float]) -> Chart:
    table = Table(
        (
            Column("from", key="from_nats", unit="nats", spell=four_digits),
            Column("to", key="to_nats", unit="nats", spell=four_digits),
            Column("predictions", note="how many differ by so much"),
        ),
        tuple(zip(edges, edges[1:], counts, strict=False)),
        title="KL divergence of each prediction",
        keys=2,
    )
    return Chart(kind="histogram", table=table, x="from_nats", until="to_nats", y=("predictions",))


def _layers(index: RowIndex, table: Table) -> tuple[Block, ...]:
    known = {column.name for column in table.columns}
    charts = []
    for names, title, words in (
        (("cosine", "state_cosine"), "direction kept", "1: the same direction as before."),
        (("relative_error", "weight_error", "state_error"), "relative error", "0: as before."),
        (("attention_divergence", "worst_head's_divergence"), "attention divergence",
         "Jensen–Shannon divergence of the heads' rows, mean and worst head."),
    ):  # fmt: skip
        there = tuple(name for name in names if name in known)
        if there:
            charts.append(
                Chart(kind="lines", table=table, x="layer", y=there, title=title, words=words,
                      link="layers")
            )  # fmt: skip
    return (*charts, table)


def _heads(index: RowIndex) -> tuple[Block, ...]:
    blocks: list[Block] = []
    divergence = [row for row in index.rows if row.metric == "js_nats" and row.head is not None]
    keys = (Column("layer"), Column("head"))
    if divergence:
        note = METRICS["js_nats"]
        value = Column(
            "divergence", key="js_nats", unit="nats", better="smaller", note=note, spell=four_digits
        )
        rows = tuple((row.layer, row.head, row.after) for row in divergence)
        table = Table((*keys, value), rows, title="attention divergence by head", keys=2)
        blocks.append(
            Chart(
                kind="heatmap",
                table=table,
                x="head",
                row="layer",
                y=("js_nats",),
                link="heads",
                width="full",
            )
        )
    for metric, words in _HEADS.items():
        found = [row for row in index.rows if row.metric == metric and row.head is not None]
        if not found:
            continue
        note = METRICS[metric]
        columns = [
            Column(side, note=note, spell=four_digits) for side in ("before", "after", "change")
        ]
        sides = tuple((row.layer, row.head, row.before, row.after, row.delta) for row in found)
        table = Table((*keys, *columns), sides, title=f"{words} by head", keys=2)
        blocks += [_side(table, words, side) for side in ("before", "after", "change")]
    return tuple(blocks)


def _side(table: Table, words: str, side: str) -> Chart:
    """Before and after in the same colours."""
    both = [value for row in table.rows for value in row[2:4]]
    return Chart(
        kind="heatmap",
        table=table,
        x="head",
        row="layer",
        y=(side,),
        link="heads",
        title=f"{words}: {side}",
        diverging=side == "change",
        scale=None if side == "change" else (min(0.0, *both), max(both) or 1.0),
        width="third",
    )


def _gates(table: Table) -> tuple[Chart, ...]:
    gates = dict.fromkeys(row[1] for row in table.rows)
    charts = []
    for gate in gates:
        rows = tuple(row for row in table.rows if row[1] == gate)
        own = Table(table.columns, rows, title=f"{gate}: mean openness", keys=2)
        charts.append(
            Chart(
                kind="lines", table=own, x="layer", y=("open_before", "open_after"), link="layers"
            )
        )
    return tuple(charts)


def series_sections(series: ComparisonSeries) -> list[Section]:
    """Each checkpoint against the first, then layer by layer."""
    table = step_table(series)
    known = [column.name for column in table.columns]
    blocks: list[Block] = [
        Chart(kind="lines", table=table, x="step", y=(name,), title=column.title, link="steps")
        for name, column in zip(known, table.columns, strict=True)
        if name in {"perplexity", "kl_nats_mean", "same_top1", "cosine"}
    ]
    sections = [Section("Checkpoints", (*blocks, table), name="checkpoints")]
    layers = step_layers(series)
    if layers:
        charts = (
            Chart(kind="lines", table=each, x="layer",
                  y=tuple(column.name for column in each.columns[1:]), link="layers")
            for each in layers
        )  # fmt: skip
        sections.append(Section("Layer by layer", (*charts,), name="layers"))
    return sections
