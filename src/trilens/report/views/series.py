"""A series of checkpoints as tables: a row per checkpoint, then layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from trilens.analysis.comparison.rows import METRICS
from trilens.analysis.comparison.series import ComparisonSeries
from trilens.report.tables import Better, Column, Table
from trilens.report.words import four_digits

__all__ = ["short_name", "step_layers", "step_table"]

_LAYERS = {
    "cosine": "residual stream: cosine with the first",
    "state_cosine": "recurrent state: cosine with the first",
}


def step_table(series: ComparisonSeries) -> Table:
    """What each checkpoint differs by from the first, in all."""
    share = "{:.1%}".format
    columns: dict[str, tuple[str, str, Better, Callable[[float], str]]] = {
        "perplexity": ("perplexity", "perplexity", "smaller", four_digits),
        "kl_nats_mean": ("KL (nats)", "KL divergence", "smaller", four_digits),
        "same_top1": ("same top", "same top token", "larger", share),
        "cosine": ("cos", "cosine", "larger", four_digits),
        "relative_error": ("rel. error", "relative error", "smaller", four_digits),
        "js_nats": ("attn JS", "attention divergence", "smaller", four_digits),
        "state_cosine": ("state cos", "state cosine", "larger", four_digits),
        "roles_lost": ("roles lost", "roles lost", "smaller", str),
        "roles_gained": ("roles gained", "roles gained", "", str),
    }
    rows = series.table()
    there = [key for key in columns if any(row[key] is not None for row in rows)]
    heads = [Column("step"), Column("checkpoint", left=True, fold=16)]
    for key in there:
        heading, words, better, spell = columns[key]
        note = METRICS.get(key, "heads that crossed the threshold of a role")
        heads.append(Column(heading, words=words, key=key, better=better, note=note, spell=spell))
    cells = ((row["step"], short_name(row["model"]), *(row[key] for key in there)) for row in rows)
    return Table(tuple(heads), tuple(cells), title="each checkpoint against the first", keys=2)


def step_layers(series: ComparisonSeries) -> list[Table]:
    """One row per layer, one column per step, for each metric that was measured."""
    tables = []
    steps = tuple(
        Column(f"step {i}", better="larger", spell=four_digits)
        for i in range(1, len(series.comparisons) + 1)
    )
    for metric, title in _LAYERS.items():
        layers = {row.layer for found in series.comparisons for row in found.select(metric)}
        rows = []
        for layer in sorted(layer for layer in layers if layer is not None):
            values: list[float | None] = [layer]
            for found in series.comparisons:
                here = [row.after for row in found.select(metric, layer=layer)]
                values.append(math.fsum(here) / len(here) if here else None)
            rows.append(tuple(values))
        if rows:
            tables.append(Table((Column("layer"), *steps), tuple(rows), title=title))
    return tables


def short_name(name: str) -> str:
    """A directory by its last name, a hub id whole."""
    return Path(name).name if Path(name).is_absolute() else name
