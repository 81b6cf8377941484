"""An inspection as tables: layers, gates, recurrent states, next tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from trilens.analysis.inspection import Attended, GateSummary, Inspection, LayerRow
from trilens.report.page import Block, Chart
from trilens.report.tables import NOTHING, Column, Table
from trilens.report.words import percent, signed, visible

__all__ = [
    "decay_note",
    "gate_columns",
    "gate_table",
    "inspection_blocks",
    "layer_table",
    "next_table",
    "state_table",
]

_MEMORY = ("decay", "dt")  # gates whose openness is how long a recurrence remembers


def gate_columns(threshold: float, prefix: str = "") -> tuple[Column, Column]:
    """Of units that are nearly always shut, and open."""
    dead = f"{prefix}dead (<{threshold:g})"
    saturated = f"{prefix}saturated (>{1 - threshold:g})"
    return (
        Column(
            dead,
            key=f"{prefix}dead".replace(" ", "_"),
            note=f"units with a mean openness below {threshold:g}",
        ),
        Column(
            saturated,
            key=f"{prefix}saturated".replace(" ", "_"),
            note=f"units with a mean openness above {1 - threshold:g}",
        ),
    )


def decay_note(names: Iterable[str]) -> str:
    """What the words for gates mean of a decay; "" where there is none."""
    if not any(name.endswith(_MEMORY) for name in names):
        return ""
    return (
        "of a decay or a step (dt), dead and saturated say how long it remembers, not that a "
        "unit is broken"
    )


def inspection_blocks(found: Inspection) -> tuple[Block, ...]:
    """A chart of each quantity by layer, the next tokens, and the table of the layers."""
    rows = found.layers
    table = layer_table(rows, gates=False)
    known = {column.name for column in table.columns}
    blocks: list[Block] = [
        Chart(kind="lines", table=table, x="layer", y=(name,), title=title, link="layers")
        for name, title in _BY_LAYER.items()
        if name in known
    ]
    if any(row.gates for row in rows):
        blocks.append(
            Chart(
                kind="heatmap", table=gate_table(rows), x="layer", row="gate", y=("mean_openness",),
                title="mean openness of gates", scale=(0.0, 1.0),
            )
        )  # fmt: skip
    if any(row.states for row in rows):
        states = state_table(rows)
        blocks.append(Chart(kind="heatmap", table=states, x="layer", row="state", y=("norm",)))
    if found.next_tokens:
        following = next_table(found)
        blocks.append(Chart(kind="bars", table=following, x="token", y=("probability",)))
    return (*blocks, table)


_BY_LAYER = {
    "residual_norm": "norm of the residual stream",
    "attention_entropy_nats": "attention entropy",
}


def gate_table(rows: Sequence[LayerRow]) -> Table:
    """One row per layer and gate."""
    threshold = next(gate.threshold for row in rows for gate in row.gates)
    return Table(
        (
            Column("layer"),
            Column("gate", left=True),
            Column("open", words="mean openness", note="from 0 (closed) to 1 (open)", spell=_two),
            *_shared(gate_columns(threshold)),
        ),
        tuple((row.layer, gate.name, *_shares(gate)) for row in rows for gate in row.gates),
        title="gates",
        keys=2,
    )


def state_table(rows: Sequence[LayerRow]) -> Table:
    """One row per tensor of a layer's recurrent state."""
    return Table(
        (
            Column("layer"),
            Column("state", left=True),
            Column("shape"),
            Column("norm after the last token", key="norm", spell="{:.4g}".format),
        ),
        tuple(
            (row.layer, state.part, "×".join(map(str, state.shape)), state.norm)
            for row in rows
            for state in row.states
        ),
        title="recurrent states",
        keys=2,
    )


def layer_table(rows: Sequence[LayerRow], *, gates: bool) -> Table:
    """One row per layer: norm, what the last token attends to, and the gates where asked."""
    names = sorted({gate.name for row in rows for gate in row.gates}) if gates else []
    attention = any(row.attended for row in rows)
    effective = any(row.effective for row in rows)
    columns = [
        Column("layer"),
        Column(
            "‖resid‖",
            words="norm of the residual stream",
            key="residual_norm",
            note="‖resid_post‖₂ of the last token",
            spell=_two,
        ),
    ]
    if attention:
        heading = "last token attends to (position token weight)"
        columns += [
            Column(heading, left=True, fold=34, key="attended"),
            Column(
                "entropy",
                words="attention entropy",
                key="attention_entropy_nats",
                unit="nats",
                note="of the last token's row, the mean over heads",
                spell=_two,
            ),
        ]
    if effective:
        heading = "effective attention (position token ±weight)"
        columns.append(Column(heading, left=True, fold=34, key="effective"))
    for name in names:
        columns.append(Column(f"{name} open", spell=_two))
        columns += _shared(gate_columns(_threshold(rows)))
    cells = []
    for row in rows:
        cell: list[float | str | None] = [row.layer, row.residual_norm]
        if attention:
            cell += [_places(row.attended, _two), row.attention_entropy_nats]
        if effective:
            cell.append(_places(row.effective, signed))
        by_name = {gate.name: gate for gate in row.gates}
        for name in names:
            cell += _shares(by_name.get(name))
        cells.append(tuple(cell))
    return Table(tuple(columns), tuple(cells), title="layer by layer")


def next_table(found: Inspection) -> Table:
    """The most probable next tokens."""
    return Table(
        (
            Column("token", left=True),
            Column("token id", key="token_id"),
            Column("probability", note="after the last token", spell="{:.3f}".format),
        ),
        tuple((visible(each.token), each.token_id, each.probability) for each in found.next_tokens),
        title="most probable next tokens",
    )


def _threshold(rows: Sequence[LayerRow]) -> float:
    return next(gate.threshold for row in rows for gate in row.gates)


def _shared(columns: tuple[Column, ...]) -> list[Column]:
    return [
        Column(each.heading, key=each.key, note=f"share of {each.note}", spell=percent)
        for each in columns
    ]


def _places(found: Sequence[Attended], spell: Callable[[float], str]) -> str:
    words = (f"{item.position} {visible(item.token)} {spell(item.weight)}" for item in found)
    return "  ".join(words) or NOTHING


def _shares(gate: GateSummary | None) -> list[float | None]:
    return [None] * 3 if gate is None else [gate.mean, gate.dead, gate.saturated]


def _two(value: float) -> str:
    return f"{value:.2f}"
