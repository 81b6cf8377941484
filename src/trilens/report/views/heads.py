"""Scores of heads as charts."""

from __future__ import annotations

from trilens.analysis.heads import HeadScores
from trilens.report.page import Chart, Section
from trilens.report.tables import Column, Table
from trilens.report.words import four_digits

__all__ = ["score_sections"]


def score_sections(found: HeadScores) -> list[Section]:
    """A heatmap of layers and heads for each role."""
    columns = tuple(
        Column(role.replace("_", " "), key=role, spell=four_digits) for role in found.roles
    )
    rows = tuple(tuple(row.values()) for row in found.table())
    table = Table((Column("layer"), Column("head"), *columns), rows, title="scores", keys=2)
    charts = (
        Chart(kind="heatmap", table=table, x="head", row="layer", y=(each.name,), title=each.title)
        for each in columns
    )
    words = (f"Means over {found.n_captures} captures.",)
    return [Section("Scores of heads", (*charts, table), words, name="scores")]
