"""The demo models next to each other: one prompt, one row per question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trilens.analysis.inspection import Inspection
from trilens.report.tables import NOTHING, Column, Table
from trilens.report.words import signed, visible

__all__ = ["side_by_side"]


def side_by_side(
    inspections: Mapping[str, Inspection], records: Mapping[str, Mapping[str, Any]]
) -> Table:
    """A column per model: how well it was trained, where it looks, what comes next.

    Args:
        inspections: the same prompt in each model, by the model's name.
        records: how each model was trained (``training.json``), by the same names.
    """
    columns = tuple(Column(name, left=True) for name in ("side by side", *inspections))
    rows = _rows(list(inspections.values()), [records[name] for name in inspections])
    cells = tuple((heading, *each) for heading, each in rows)
    return Table(columns, cells, title="side by side")


def _rows(
    inspections: Sequence[Inspection], records: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    rows = [
        ("parameters", [f"{record['parameters'] / 1e6:.2f} M" for record in records]),
        ("held-out loss", [f"{record['heldout_loss_nats']:.2f} nats/token" for record in records]),
        ("residual grows", [_growth(inspection) for inspection in inspections]),
    ]
    rows.append(("weights", [_weights(inspection) for inspection in inspections]))
    for layer in range(max(inspection.n_layers for inspection in inspections)):
        rows.append((f"layer {layer} reads", [_reads(each, layer) for each in inspections]))
    rows.append(("next", [_next(inspection) for inspection in inspections]))
    return rows


def _growth(inspection: Inspection) -> str:
    norms = [row.residual_norm for row in inspection.layers]
    return f"{norms[0]:.0f} → {norms[-1]:.0f}"


def _weights(inspection: Inspection) -> str:
    """What the weights below are: the two kinds are on different scales."""
    softmax = any(row.attended for row in inspection.layers)
    return "softmax, sum to 1" if softmax else "effective, signed"


def _reads(inspection: Inspection, layer: int) -> str:
    row = next((row for row in inspection.layers if row.layer == layer), None)
    found = () if row is None else (row.attended or row.effective)
    if not found:
        return NOTHING
    first = found[0]
    weight = f"{first.weight:.2f}" if row is not None and row.attended else signed(first.weight)
    return f"{first.position} {visible(first.token)} {weight}"


def _next(inspection: Inspection) -> str:
    return "  ".join(
        f"{visible(item.token)} {item.probability:.2f}" for item in inspection.next_tokens[:2]
    )
