"""Direct logit attribution as a table."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.direct_attribution import Attribution
from trilens.report.text.inspection import signed, visible
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_attribution"]


def print_attribution(found: Attribution, console: Console) -> None:
    """One row per part, the sum last."""
    words = f"{visible(found.target_text)} (id {found.target})"
    if found.against is not None:
        words += f" against {visible(found.against_text or '')} (id {found.against})"
    print_line(console, f"logit of {words}, after position {found.position}")
    numbered = found.by != "component"
    columns: list[Column | str] = ["layer", Column("part", left=True)]
    columns += [found.by] if numbered else []
    columns.append("adds")
    cells = []
    for row in found.table():
        cell = ["–" if row["layer"] is None else str(row["layer"]), row["component"]]
        cell += [] if not numbered else ["–" if row["index"] is None else str(row["index"])]
        cells.append([*cell, signed(row["value"])])
    print_table(console, columns, cells, keys=2)
    print_line(console, f"the model's own: {signed(found.logit_difference)}")
    for note in found.notes:
        print_line(console, f"note: {note}", style="dim")
