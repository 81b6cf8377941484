"""A series of checkpoints as text: one row per checkpoint, then layer by layer."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.comparison.series import ComparisonSeries
from trilens.report.text.comparison import counted
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.series import short_name, step_layers, step_table
from trilens.report.words import four_digits

__all__ = ["print_series"]


def print_series(series: ComparisonSeries, console: Console) -> None:
    """Print what each checkpoint differs by from the first, in all and by layer."""
    first = series.comparisons[0]
    before = first.before
    words = f"{short_name(before.name)} · {before.model_class} · {before.n_layers} layers"
    print_line(console, f"first  {words} · {before.dtype}")
    print_line(console, counted(first))
    perplexity = first.select("perplexity")
    if perplexity:
        print_line(console, f"perplexity of the first {four_digits(perplexity[0].before)}")
    console.print()
    print_rows(console, step_table(series))
    for table in step_layers(series):
        console.print()
        print_line(console, table.title, style="bold")
        print_rows(console, table)
    notes = dict.fromkeys(note for found in series.comparisons for note in found.notes)
    for note in notes:
        print_line(console, f"note: {note}", style="dim")
