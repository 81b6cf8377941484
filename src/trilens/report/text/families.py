"""The family sweep as text."""

from __future__ import annotations

from rich.console import Console

from trilens.models.families import FamilyTable, spell_short
from trilens.report.text.tables import Cell, Column, print_line, print_table

__all__ = ["print_families"]

_REASON = 80  # characters that are shown of why a type is not captured in full
_MARKS = {"full": "full", "residual": "residual only", "refused": "refused"}


def print_families(families: FamilyTable, console: Console, *, whole: bool = False) -> None:
    """Draw one row per model type, layer numbers of a tiny model of the type, and the counts.

    Args:
        families: the types.
        console: where to.
        whole: print reasons in full, however long.
    """
    columns: list[Column | str] = [
        Column("type", left=True, fold=14), Column("captured", left=True, fold=8),
        "layers", Column("softmax", left=True, fold=7),
        Column("effective", left=True, fold=9), Column("gates", left=True, fold=20),
    ]  # fmt: skip
    reasons = any(row.reason or row.no_effective for row in families.rows)
    if reasons:
        columns.append(Column("why not more", left=True, fold=20))
    cells: list[tuple[Cell, ...]] = []
    for row in families.rows:
        reason = "; ".join(filter(None, (row.reason, row.no_effective)))
        if not whole and len(reason) > _REASON:
            reason = f"{reason[: _REASON - 1]}…"
        cells.append(
            (
                row.model_type,
                _MARKS.get(row.outcome, row.outcome),
                str(row.n_layers or "–"),
                spell_short(row.attention),
                spell_short(row.effective),
                tuple(map(str, row.gates)) or "–",
                *([reason] if reasons else []),
            )
        )
    print_table(console, columns, cells)
    counts = families.count()
    parts = [f"{counts.get(key, 0)} {name}" for key, name in _MARKS.items()]
    console.print()
    print_line(
        console,
        f"{len(families.rows)} types of transformers {families.transformers}: "
        f"{', '.join(parts)}; {families.n_gated} with proven gates, "
        f"{families.n_effective} with effective attention",
    )
