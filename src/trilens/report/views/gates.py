"""The gates of a capture as charts and tables."""

from __future__ import annotations

import math

import numpy as np

from trilens.caches.gates import GateCache
from trilens.report.page import Block, Chart, Section
from trilens.report.tables import Column, Table
from trilens.report.views.inspection import decay_note
from trilens.report.words import horizon, percent

__all__ = ["gate_section"]

_BINS = 20
_THRESHOLD = 0.1


def gate_section(gates: GateCache, threshold: float = _THRESHOLD) -> Section | None:
    """Openness, dead and saturated units, memory horizons; None where no gate has an openness."""
    rated = [(name, layer) for name, layer in gates if gates.spec(name, layer).kind != "linear"]
    if not rated:
        return None
    charts: list[Block] = []
    for name in dict.fromkeys(name for name, _ in rated):
        layers = [layer for each, layer in rated if each == name]
        charts.append(_histogram(gates, name, layers, threshold))
    summary = _summary(gates, rated, threshold)
    horizons = _horizons(gates, rated)
    blocks: tuple[Block, ...] = (*charts, *horizons, summary)
    note = decay_note(name for name, _ in rated)
    words = (
        "How open each gate was, from 0 (closed) to 1 (open): the share of its units with each "
        "mean openness over the prompt.",
        *((f"Of a decay, {note.partition(', ')[2]}.",) if note else ()),
    )
    return Section("Gates", blocks, words, name="gates")


def _histogram(gates: GateCache, name: str, layers: list[int], threshold: float) -> Chart:
    edges = np.linspace(0, 1, _BINS + 1)
    rows = []
    for layer in layers:
        average = gates.analyse(name, layer, threshold).avg_gate
        counts, _ = np.histogram(average.clip(0, 1), edges)
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            rows.append((layer, f"{low:.2f}–{high:.2f}", count / len(average), int(count)))
    table = Table(
        (
            Column("layer"),
            Column("mean openness", left=True, note="of a unit, over the prompt"),
            Column("share of units", note="of the gate's units in this layer", spell=percent),
            Column("units"),
        ),
        tuple(rows),
        title=f"{name}: units by openness",
        keys=2,
    )
    formula = gates.spec(name, layers[0]).formula
    return Chart(
        kind="heatmap",
        table=table,
        x="mean_openness",
        row="layer",
        y=("share_of_units",),
        words=f"{formula}; dead below {threshold:g}, saturated above {1 - threshold:g}",
    )


def _summary(gates: GateCache, rated: list[tuple[str, int]], threshold: float) -> Table:
    rows = []
    for name, layer in rated:
        found = gates.analyse(name, layer, threshold)
        units = len(found.avg_gate)
        rows.append(
            (
                layer,
                name,
                units,
                float(found.avg_gate.mean()),
                len(found.dead_gates) / units,
                len(found.saturated_gates) / units,
                float(found.effective_capacity()),
            )
        )
    return Table(
        (
            Column("layer"),
            Column("gate", left=True),
            Column("units"),
            Column("mean openness", spell="{:.3f}".format),
            Column(f"dead (<{threshold:g})", key="dead", note="share of its units", spell=percent),
            Column(
                f"saturated (>{1 - threshold:g})",
                key="saturated",
                note="share of its units",
                spell=percent,
            ),
            Column(
                "effective capacity",
                note="share of units that are neither dead nor saturated",
                spell=percent,
            ),
        ),
        tuple(sorted(rows)),
        title="gates by layer",
        keys=2,
    )


def _horizons(gates: GateCache, rated: list[tuple[str, int]]) -> tuple[Chart, ...]:
    """Quartiles over units of the memory horizon at the mean decay of the prompt."""
    decays = [key for key in rated if gates.spec(*key).kind == "decay"]
    charts = []
    for name in dict.fromkeys(name for name, _ in decays):
        rows = []
        for layer in (layer for each, layer in decays if each == name):
            per_unit = gates.horizon_tokens(name, layer)
            # The mean decay's horizon: a mean of horizons would be the longest one's.
            kept = (1 - 1 / per_unit).mean(0)
            horizons = (1 / (1 - kept)).cpu().numpy()
            quartiles = np.quantile(horizons, (0.25, 0.5, 0.75), method="nearest")
            values = [float(x) if math.isfinite(x) else None for x in quartiles]
            rows.append((layer, *values))
        note = "1/(1 − a) tokens at the unit's mean decay a"
        table = Table(
            (
                Column("layer"),
                *(
                    Column(words, key=key, unit="tokens", note=note, spell=horizon)
                    for words, key in (
                        ("lower quartile", "q25_tokens"),
                        ("median", "median_tokens"),
                        ("upper quartile", "q75_tokens"),
                    )
                ),
            ),
            tuple(rows),
            title=f"{name}: memory horizon",
        )
        charts.append(
            Chart(
                kind="lines",
                table=table,
                x="layer",
                y=("q25_tokens", "median_tokens", "q75_tokens"),
                log=True,
                words="How many tokens a unit remembers: quartiles over its units.",
            )
        )
    return tuple(charts)
