"""Direct logit attribution as a table."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.direct_attribution import Attribution
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.attribution import attribution_table, attribution_title
from trilens.report.words import signed

__all__ = ["print_attribution"]


def print_attribution(found: Attribution, console: Console) -> None:
    """One row per part, the sum last."""
    print_line(console, attribution_title(found))
    print_rows(console, attribution_table(found))
    print_line(console, f"the model's own: {signed(found.logit_difference)}")
    for note in found.notes:
        print_line(console, f"note: {note}", style="dim")
