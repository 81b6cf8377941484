"""A comparison as tables: output, layer by layer, gates, roles of heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from trilens.analysis.comparison.heads import RoleChange
from trilens.analysis.comparison.rows import METRICS, Row
from trilens.report.tables import Better, Column, Table
from trilens.report.views.inspection import gate_columns
from trilens.report.words import four_digits

__all__ = ["RowIndex", "change_gates", "change_layers", "mean_after", "ratio", "role_table"]

Pick = Callable[[Sequence[Row]], float]


class RowIndex:
    """Rows by metric, then by layer."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)
        self.found: dict[tuple[str, int | None], list[Row]] = {}
        for row in self.rows:
            self.found.setdefault((row.metric, row.layer), []).append(row)
        self.layers = sorted({row.layer for row in self.rows if row.layer is not None})

    def of(self, metric: str, layer: int | None) -> list[Row]:
        """The rows of a metric in a layer, or of the model as a whole."""
        return self.found.get((metric, layer), [])

    def one(self, metric: str) -> Row | None:
        """The model's row of a metric, if it has one."""
        rows = self.of(metric, None)
        return rows[0] if rows else None


def mean_after(rows: Sequence[Row]) -> float:
    """The mean of what was found after."""
    return math.fsum(row.after for row in rows) / len(rows)


def _max_after(rows: Sequence[Row]) -> float:
    return max(row.after for row in rows)


def _mean_delta(rows: Sequence[Row]) -> float:
    return sum(row.delta for row in rows) / len(rows)


def ratio(after: float, before: float) -> float:
    """After over before; 1 where they are equal."""
    if after == before:
        return 1.0
    return after / before if before else math.inf


def _column(
    heading: str,
    words: str,
    metric: str,
    better: Better = "",
    spell: Callable[[float], str] = four_digits,
    *,
    unit: str = "",
) -> tuple[Column, str]:
    column = Column(
        heading, words=words, unit=unit, better=better, note=METRICS[metric], spell=spell
    )
    return column, metric


def change_layers(index: RowIndex) -> Table:
    """One row per layer; columns of what no layer has are left out."""
    share, delta = "{:.1%}".format, "{:+.1%}".format
    columns: tuple[tuple[tuple[Column, str], Pick], ...] = (
        (_column("cos", "cosine", "cosine", "larger"), mean_after),
        (_column("cos last", "cosine, last token", "cosine_last", "larger"), mean_after),
        (_column("rel. error", "relative error", "relative_error", "smaller"), mean_after),
        (_column("state cos", "state cosine", "state_cosine", "larger"), mean_after),
        (_column("state error", "state error", "state_relative_error", "smaller"), mean_after),
        (_column("attn JS", "attention divergence", "js_nats", "smaller", unit="nats"), mean_after),
        (
            _column("worst", "worst head's divergence", "js_nats", "smaller", unit="nats"),
            _max_after,
        ),
        (_column("Δ entropy", "change of entropy", "entropy_nats", unit="nats"), _mean_delta),
        (
            _column("Δ distance", "change of distance", "distance_tokens", unit="tokens"),
            _mean_delta,
        ),
        (_column("Δ first", "change of first-token mass", "first_token_mass"), _mean_delta),
        (_column("converged", "converged", "settled", spell=share), mean_after),
        (_column("Δ converged", "change of converged", "settled", spell=delta), _mean_delta),
        (_column("W error", "weight error", "weight_relative_error", "smaller"), mean_after),
        (_column("zeros", "zero weights", "weight_sparsity", spell=share), mean_after),
    )
    there = [each for each in columns if any(index.of(each[0][1], i) for i in index.layers)]
    rows = []
    for layer in index.layers:
        row: list[float | None] = [layer]
        for (_, metric), pick in there:
            found = index.of(metric, layer)
            row.append(pick(found) if found else None)
        rows.append(tuple(row))
    heads = (Column("layer"), *(each[0][0] for each in there))
    return Table(heads, tuple(rows), title="layer by layer")


def change_gates(index: RowIndex, threshold: float) -> Table | None:
    """One row per gate and layer; None where no gate was compared."""
    places = [(row.layer, row.module) for row in index.rows if row.metric == "openness"]
    if not places:
        return None
    by_place = {(row.layer, row.module, row.metric): row for row in index.rows}
    horizons = any((*place, "horizon_tokens") in by_place for place in places)
    rows = []
    for layer, module in places:
        opened = by_place[layer, module, "openness"]
        horizon = by_place.get((layer, module, "horizon_tokens"))
        row: list[float | str | None] = [
            layer,
            module,
            opened.before,
            opened.after,
            by_place[layer, module, "openness_abs_change"].after,
            by_place[layer, module, "newly_dead"].after,
            by_place[layer, module, "newly_saturated"].after,
        ]
        if horizons:
            row += [None, None] if horizon is None else [horizon.before, horizon.after]
        rows.append(tuple(row))
    three = "{:.3f}".format
    columns = [
        Column("layer"),
        Column("gate", left=True),
        Column("open before", note=METRICS["openness"], spell=three),
        Column("open after", note=METRICS["openness"], spell=three),
        Column(
            "|Δ unit|",
            words="mean change of a unit",
            better="smaller",
            note=METRICS["openness_abs_change"],
            spell=four_digits,
        ),
        *(
            Column(
                each.heading, key=each.key, better="smaller", note=each.note, spell="{:.0f}".format
            )
            for each in gate_columns(threshold, "newly ")
        ),
    ]
    if horizons:
        note = METRICS["horizon_tokens"]
        columns += [
            Column(f"horizon {side}", unit="tokens", note=note, spell=four_digits)
            for side in ("before", "after")
        ]
    return Table(tuple(columns), tuple(rows), title="gates", keys=2)


def role_table(changes: Sequence[RoleChange], shown: int | None = None) -> Table:
    """Heads that lost or gained a role, the largest change first."""
    ranked = sorted(changes, key=lambda each: -abs(each.after - each.before))[:shown]
    three = "{:.3f}".format
    return Table(
        (
            Column("layer"),
            Column("head"),
            Column("role", left=True),
            Column("before", note="score of the role, in [0, 1]", spell=three),
            Column("after", note="score of the role, in [0, 1]", spell=three),
            Column("outcome", left=True),
        ),
        tuple(
            (
                each.layer,
                each.head,
                each.role.replace("_", "-"),
                each.before,
                each.after,
                "lost" if each.lost else "gained",
            )
            for each in ranked
        ),
        title="heads that lost or gained a role",
        keys=2,
    )
