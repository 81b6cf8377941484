"""The family sweep as text."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilens.models.families import FamilyTable, spell_short

__all__ = ["print_families"]

_MARKS = {"full": "full", "residual": "residual only", "refused": "refused"}


def print_families(families: FamilyTable, console: Console) -> None:
    """Draw one row per model type, layer numbers of a tiny model of the type, and the counts."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("type", "captured", "layers", "softmax", "effective", "gates", "why not more"):
        table.add_column(heading, overflow="fold")
    for row in families.rows:
        gates = "\n".join(map(str, row.gates))
        reasons = "; ".join(filter(None, (row.reason, row.no_effective)))
        cells = (
            row.model_type,
            _MARKS.get(row.outcome, row.outcome),
            str(row.n_layers or "–"),
            spell_short(row.attention),
            spell_short(row.effective),
            gates or "–",
            reasons,
        )
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    counts = families.count()
    parts = [f"{counts.get(key, 0)} {name}" for key, name in _MARKS.items()]
    console.print(
        f"\n{len(families.rows)} types of transformers {families.transformers}: "
        f"{', '.join(parts)}; {families.n_gated} with proven gates, "
        f"{families.n_effective} with effective attention"
    )
