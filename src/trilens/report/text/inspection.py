"""Results as text for a terminal. Knows results, never models."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilens.analysis.inspection import Inspection, LayerRow

__all__ = ["print_inspection", "signed", "visible"]

_ESCAPES = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}
_SHOWN_TOKENS = 12


def visible(token: str, width: int = 14) -> str:
    """A token as one visible word: white space drawn, long tokens cut."""
    shown = "".join(_ESCAPES.get(char, char if char.isprintable() else "·") for char in token)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Draw the table of an inspection and the most probable next tokens."""
    console.print(
        Text.assemble(
            (inspection.model or inspection.model_class, "bold"),
            f" · {inspection.model_class} · {inspection.n_layers} layers · "
            f"d_model {inspection.d_model} · {inspection.dtype}",
        )
    )
    tokens = inspection.tokens
    head = " ".join(visible(token) for token in tokens[-_SHOWN_TOKENS:])
    dots = "… " if len(tokens) > _SHOWN_TOKENS else ""
    console.print(Text(f"{len(tokens)} tokens: {dots}{head}\n"))
    several = len({gate.name for row in inspection.layers for gate in row.gates}) > 1
    console.print(_table(inspection.layers, gates=not several))
    if several:
        console.print()
        console.print(_gate_table(inspection.layers))
    if inspection.next_tokens:
        following = "  ".join(
            f"{visible(item.token)} {item.probability:.3f}" for item in inspection.next_tokens
        )
        console.print(Text(f"\nnext: {following}"))
    for note in inspection.notes:
        console.print(Text(f"note: {note}", style="dim"))


def _gate_table(rows: Sequence[LayerRow]) -> Table:
    """One row per gate: a hybrid has too many for columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("layer", "gate", "open", "dead", "sat."):
        table.add_column(heading, justify="left" if heading == "gate" else "right", no_wrap=True)
    for row in rows:
        for gate in row.gates:
            cells = (
                str(row.layer),
                gate.name,
                f"{gate.mean:.2f}",
                f"{gate.dead:.0%}",
                f"{gate.saturated:.0%}",
            )
            table.add_row(*(Text(cell) for cell in cells))
    return table


def _table(rows: Sequence[LayerRow], *, gates: bool) -> Table:
    names = sorted({gate.name for row in rows for gate in row.gates}) if gates else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("‖resid‖", justify="right", no_wrap=True)
    attention = any(row.attended for row in rows)
    if attention:
        table.add_column("last token attends to (position token weight)", overflow="fold")
        table.add_column("entropy", justify="right", no_wrap=True)
    effective = any(row.effective for row in rows)
    if effective:
        table.add_column("effective attention (position token ±weight)", overflow="fold")
    for name in names:
        table.add_column(f"{name} open", justify="right", no_wrap=True)
        table.add_column("dead", justify="right", no_wrap=True)
        table.add_column("sat.", justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row.layer), f"{row.residual_norm:.2f}"]
        if attention:
            cells.append(
                "  ".join(
                    f"{item.position} {visible(item.token)} {item.weight:.2f}"
                    for item in row.attended
                )
                or "–"
            )
            entropy = row.attention_entropy_nats
            cells.append("–" if entropy is None else f"{entropy:.2f}")
        if effective:
            cells.append(
                "  ".join(
                    f"{item.position} {visible(item.token)} {signed(item.weight)}"
                    for item in row.effective
                )
                or "–"
            )
        by_name = {gate.name: gate for gate in row.gates}
        for name in names:
            gate = by_name.get(name)
            cells += (
                ["–"] * 3
                if gate is None
                else [f"{gate.mean:.2f}", f"{gate.dead:.0%}", f"{gate.saturated:.0%}"]
            )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def signed(weight: float) -> str:
    """A weight with its sign, three digits whatever its size."""
    return f"{weight:+.3g}".replace("-", "−")
