"""A logit lens as text for a terminal."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.lenses.logit_lens import LogitLens
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.logit_lens import lens_notes, lens_position

__all__ = ["print_logit_lens"]


def print_logit_lens(found: LogitLens, console: Console) -> None:
    """Draw one table per position: the most probable next tokens of each layer."""
    for j in range(len(found.positions)):
        if j:
            console.print()
        table = lens_position(found, j)
        print_line(console, table.title)
        print_rows(console, table)
    for text in lens_notes(found):
        print_line(console, f"note: {text}", style="dim")
