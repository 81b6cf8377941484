"""Results as text for a terminal. Knows results, never models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console

from trilens.analysis.inspection import Attended, GateSummary, Inspection, LayerRow
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["gate_headings", "print_decay_note", "print_inspection", "signed", "visible"]

_ESCAPES = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣"}
_SHOWN_TOKENS = 12
_MEMORY = ("decay", "dt")  # gates whose openness is how long a recurrence remembers
_WIDE = 100  # below, the gate of a layer does not fit beside what it attends to


def visible(token: str, width: int = 14) -> str:
    """A token as one visible word: white space drawn, long tokens cut."""
    shown = "".join(_ESCAPES.get(char, char if char.isprintable() else "·") for char in token)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


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
    names = {gate.name for row in inspection.layers for gate in row.gates}
    several = len(names) > 1 or (bool(names) and console.width < _WIDE)
    _print_layers(inspection.layers, console, gates=not several)
    if several:
        console.print()
        _print_gates(inspection.layers, console)
    print_decay_note(names, console)
    if any(row.states for row in inspection.layers):
        console.print()
        _print_states(inspection.layers, console)
    if inspection.next_tokens:
        following = "  ".join(
            f"{visible(item.token)} {item.probability:.3f}" for item in inspection.next_tokens
        )
        console.print()
        print_line(console, f"next: {following}")
    for note in inspection.notes:
        print_line(console, f"note: {note}", style="dim")


def gate_headings(threshold: float, prefix: str = "") -> list[str]:
    """What stands above the counts of units that are nearly always shut, and open."""
    return [f"{prefix}dead (<{threshold:g})", f"{prefix}saturated (>{1 - threshold:g})"]


def print_decay_note(names: Iterable[str], console: Console) -> None:
    """Say what the words for gates mean of a decay, where there is one."""
    if any(name.endswith(_MEMORY) for name in names):
        words = "note: of a decay or a step (dt), dead and saturated say how long it remembers"
        print_line(console, f"{words}, not that a unit is broken", style="dim")


def _headings(rows: Sequence[LayerRow]) -> list[str]:
    return gate_headings(next(gate.threshold for row in rows for gate in row.gates))


def _print_gates(rows: Sequence[LayerRow], console: Console) -> None:
    """One row per gate: a hybrid has too many for columns, and a narrow terminal no room."""
    cells = [[str(row.layer), gate.name, *_shares(gate)] for row in rows for gate in row.gates]
    columns: list[Column | str] = ["layer", Column("gate", left=True), "open", *_headings(rows)]
    print_table(console, columns, cells, keys=2)


def _print_states(rows: Sequence[LayerRow], console: Console) -> None:
    cells = [
        (str(row.layer), state.part, "×".join(map(str, state.shape)), f"{state.norm:.4g}")
        for row in rows
        for state in row.states
    ]
    columns: list[Column | str] = [
        "layer",
        Column("state", left=True),
        "shape",
        "norm after the last token",
    ]
    print_table(console, columns, cells, keys=2)


def _print_layers(rows: Sequence[LayerRow], console: Console, *, gates: bool) -> None:
    names = sorted({gate.name for row in rows for gate in row.gates}) if gates else []
    attention = any(row.attended for row in rows)
    effective = any(row.effective for row in rows)
    columns: list[Column | str] = ["layer", "‖resid‖"]
    if attention:
        heading = "last token attends to (position token weight)"
        columns += [Column(heading, left=True, fold=34), "entropy"]
    if effective:
        heading = "effective attention (position token ±weight)"
        columns.append(Column(heading, left=True, fold=34))
    for name in names:
        columns += [f"{name} open", *_headings(rows)]
    cells = []
    for row in rows:
        cells.append([str(row.layer), f"{row.residual_norm:.2f}"])
        if attention:
            entropy = row.attention_entropy_nats
            cells[-1].append(_places(row.attended, "{:.2f}".format))
            cells[-1].append("–" if entropy is None else f"{entropy:.2f}")
        if effective:
            cells[-1].append(_places(row.effective, signed))
        by_name = {gate.name: gate for gate in row.gates}
        for name in names:
            cells[-1] += _shares(by_name.get(name))
    print_table(console, columns, cells)


def _places(found: Sequence[Attended], spell: Callable[[float], str]) -> str:
    words = (f"{item.position} {visible(item.token)} {spell(item.weight)}" for item in found)
    return "  ".join(words) or "–"


def _shares(gate: GateSummary | None) -> list[str]:
    if gate is None:
        return ["–"] * 3
    return [f"{gate.mean:.2f}", f"{gate.dead:.0%}", f"{gate.saturated:.0%}"]


def signed(weight: float) -> str:
    """A weight with its sign, three digits whatever its size."""
    return f"{weight:+.3g}".replace("-", "−")
