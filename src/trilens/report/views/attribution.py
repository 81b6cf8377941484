"""Direct logit attribution as a table."""

from __future__ import annotations

from trilens.analysis.direct_attribution import Attribution
from trilens.report.tables import Column, Table
from trilens.report.words import signed, visible

__all__ = ["attribution_table", "attribution_title"]


def attribution_title(found: Attribution) -> str:
    """Which logit was split, and where."""
    words = f"{visible(found.target_text)} (id {found.target})"
    if found.against is not None:
        words += f" against {visible(found.against_text or '')} (id {found.against})"
    return f"logit of {words}, after position {found.position}"


def attribution_table(found: Attribution) -> Table:
    """One row per part, the sum last."""
    numbered = found.by != "component"
    columns = [Column("layer"), Column("part", left=True)]
    columns += [Column(found.by)] if numbered else []
    columns.append(Column("adds", note="to the logit, or to the difference", spell=signed))
    rows = []
    for row in found.table():
        index = [row["index"]] if numbered else []
        rows.append((row["layer"], row["component"], *index, row["value"]))
    return Table(tuple(columns), tuple(rows), title="what each part adds", keys=2)
