"""The family sweep as text."""

from __future__ import annotations

from rich.console import Console

from trilens.models.families import FamilyRow, FamilyTable, spell_short
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_families", "print_family_details"]

_MARKS = {"full": "full", "residual": "residual only", "refused": "refused"}


def print_families(families: FamilyTable, console: Console) -> None:
    """Draw one row per model type, layer numbers of a tiny model of the type, and the counts."""
    columns: list[Column | str] = [
        Column("type", left=True, fold=14), Column("captured", left=True, fold=8),
        Column("softmax", left=True, fold=7), Column("effective", left=True, fold=9),
        Column("gates", left=True, fold=18),
    ]  # fmt: skip
    cells = [
        (
            row.model_type,
            _MARKS.get(row.outcome, row.outcome),
            spell_short(row.attention),
            spell_short(row.effective),
            ", ".join(dict.fromkeys(gate.name for gate in row.gates)) or "–",
        )
        for row in families.rows
    ]
    print_table(console, columns, cells)
    counts = families.count()
    parts = [f"{counts.get(key, 0)} {name}" for key, name in _MARKS.items()]
    console.print()
    print_line(
        console,
        f"{len(families.rows)} types of transformers {families.transformers}: "
        f"{', '.join(parts)}; {families.n_gated} with proven gates, "
        f"{families.n_effective} with effective attention, "
        f"{families.n_sited} of those in full with all core sites",
    )
    print_line(
        console, "trilens families --type NAME: ranges and layers of gates, sites, why not more"
    )


def print_family_details(families: FamilyTable, console: Console) -> None:
    """Draw each model type in full: what was proven, where, and why not more."""
    for number, row in enumerate(families.rows):
        if number:
            console.print()
        print_line(console, row.model_type, style="bold")
        width = max(len(heading) for heading, _ in _details(row))
        for heading, cell in _details(row):
            print_line(console, f"  {heading:<{width}}  {cell}")


def _details(row: FamilyRow) -> list[tuple[str, str]]:
    lines = [
        ("class", row.model_class),
        ("captured", _MARKS.get(row.outcome, row.outcome)),
        ("layers", f"{row.n_layers or '–'} in the tiny model that was swept"),
        ("softmax", spell_short(row.attention)),
        ("effective", spell_short(row.effective)),
        ("states", spell_short(row.states)),
        *(("gate", str(gate)) for gate in row.gates),
        ("sites", ", ".join(row.sites) or "–"),
    ]
    lines += [(f"no {name}", why) for name, why in row.no_sites]
    reasons = [reason for reason in (row.reason, row.no_effective) if reason]
    return [*lines, *(("why not more", reason) for reason in reasons)]
