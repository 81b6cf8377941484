"""An inspection as text for a terminal. Knows results, never models."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from trilens.analysis.inspection import Inspection
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.inspection import decay_note, gate_table, layer_table, state_table
from trilens.report.words import visible

__all__ = ["print_decay_note", "print_inspection"]

_SHOWN_TOKENS = 12
_WIDE = 100  # below, the gate of a layer does not fit beside what it attends to


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Draw the table of an inspection and the most probable next tokens."""
    print_line(
        console,
        f" · {inspection.model_class} · {inspection.n_layers} layers · "
        f"d_model {inspection.d_model} · {inspection.dtype}",
        head=inspection.model or inspection.model_class,
    )
    tokens = inspection.tokens
    head = " ".join(visible(token) for token in tokens[-_SHOWN_TOKENS:])
    dots = "… " if len(tokens) > _SHOWN_TOKENS else ""
    print_line(console, f"{len(tokens)} tokens: {dots}{head}")
    console.print()
    rows = inspection.layers
    names = {gate.name for row in rows for gate in row.gates}
    # A hybrid has too many gates for columns, and a narrow terminal no room.
    several = len(names) > 1 or (bool(names) and console.width < _WIDE)
    print_rows(console, layer_table(rows, gates=not several))
    if several:
        console.print()
        print_rows(console, gate_table(rows))
    print_decay_note(names, console)
    if any(row.states for row in rows):
        console.print()
        print_rows(console, state_table(rows))
    if inspection.next_tokens:
        following = "  ".join(
            f"{visible(item.token)} {item.probability:.3f}" for item in inspection.next_tokens
        )
        console.print()
        print_line(console, f"next: {following}")
    for note in inspection.notes:
        print_line(console, f"note: {note}", style="dim")


def print_decay_note(names: Iterable[str], console: Console) -> None:
    """Say what the words for gates mean of a decay, where there is one."""
    note = decay_note(names)
    if note:
        print_line(console, f"note: {note}", style="dim")
