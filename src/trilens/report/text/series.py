"""A series of checkpoints as text: one row per checkpoint, then layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from trilens.analysis.comparison.series import ComparisonSeries
from trilens.report.text.comparison import counted, four_digits
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_series"]

_NONE = "–"


def print_series(series: ComparisonSeries, console: Console) -> None:
    """Print what each checkpoint differs by from the first, in all and by layer."""
    first = series.comparisons[0]
    before = first.before
    words = f"{_short(before.name)} · {before.model_class} · {before.n_layers} layers"
    print_line(console, f"first  {words} · {before.dtype}")
    print_line(console, counted(first))
    perplexity = first.select("perplexity")
    if perplexity:
        print_line(console, f"perplexity of the first {four_digits(perplexity[0].before)}")
    console.print()
    _print_steps(series.table(), console)
    for metric, title in (
        ("cosine", "residual stream: cosine with the first"),
        ("state_cosine", "recurrent state: cosine with the first"),
    ):
        _print_layers(series, metric, title, console)
    notes = dict.fromkeys(note for found in series.comparisons for note in found.notes)
    for note in notes:
        print_line(console, f"note: {note}", style="dim")


def _print_steps(rows: list[dict[str, Any]], console: Console) -> None:
    spellings: dict[str, tuple[str, Callable[[float], str]]] = {
        "perplexity": ("perplexity", four_digits),
        "kl_nats_mean": ("KL (nats)", four_digits),
        "same_top1": ("same top", "{:.1%}".format),
        "cosine": ("cos", four_digits),
        "relative_error": ("rel. error", four_digits),
        "js_nats": ("attn JS", four_digits),
        "state_cosine": ("state cos", four_digits),
        "roles_lost": ("roles lost", str),
        "roles_gained": ("roles gained", str),
    }
    there = [key for key in spellings if any(row[key] is not None for row in rows)]
    columns: list[Column | str] = ["step", Column("checkpoint", left=True, fold=16)]
    columns += [spellings[key][0] for key in there]
    cells = []
    for row in rows:
        values = [(spellings[key][1], row[key]) for key in there]
        shown = [_NONE if value is None else spell(value) for spell, value in values]
        cells.append([str(row["step"]), _short(row["model"]), *shown])
    print_table(console, columns, cells, keys=2)


def _print_layers(series: ComparisonSeries, metric: str, title: str, console: Console) -> None:
    """One row per layer, one column per step."""
    values: dict[int, list[str]] = {}
    layers = {row.layer for found in series.comparisons for row in found.select(metric)}
    for layer in sorted(layer for layer in layers if layer is not None):
        for found in series.comparisons:
            rows = [row.after for row in found.select(metric, layer=layer)]
            cell = four_digits(math.fsum(rows) / len(rows)) if rows else _NONE
            values.setdefault(layer, []).append(cell)
    if not values:
        return
    console.print()
    print_line(console, title, style="bold")
    steps = [f"step {i}" for i in range(1, len(series.comparisons) + 1)]
    print_table(console, ["layer", *steps], [[str(i), *row] for i, row in values.items()])


def _short(name: str) -> str:
    # A directory by its last name, a hub id whole.
    return Path(name).name if Path(name).is_absolute() else name
