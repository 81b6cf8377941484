"""Sweeps of points as tables."""

from __future__ import annotations

import math

from trilens.analysis.patch_result import PatchSweep
from trilens.report.tables import NOTHING, Column, Table
from trilens.report.words import token_text

__all__ = ["patch_grid", "patch_points", "patch_way"]

_WAYS = {
    "denoise": "clean values into the corrupted run",
    "noise": "corrupted values into the clean run",
}


def patch_way(found: PatchSweep) -> tuple[str, str]:
    """What was patched, and what an effect is of: two lines."""
    return (
        f"{found.site} by {found.by} · {_WAYS[found.direction]} · {found.method}",
        f"metric {found.base:.4f} in the run that is patched (effect 0), {found.target:.4f} in "
        "the other (effect 1)",
    )


def patch_grid(found: PatchSweep) -> Table:
    """A row per position or head, a column per layer."""
    keys: tuple[Column, ...] = (Column("head"),)
    if found.by == "position":
        keys = (Column("position"), Column("token", left=True, fold=16))
    columns = (*keys, *(Column(f"layer {i}", spell=_effect) for i in found.layers))
    effects = found.effects
    rows = []
    for column, place in enumerate(found.places):
        names = [place] if found.by == "head" else [place, repr(found.tokens[place])]
        rows.append((*names, *(float(each) for each in effects[:, column])))
    return Table(columns, tuple(rows), title="effects", keys=len(keys))


def patch_points(found: PatchSweep) -> Table:
    """A row per point."""
    by_head = found.by == "head"
    place = (Column("head"),) if by_head else (Column("position"), Column("token", left=True))
    rows = []
    for row in found.table():
        at = [row["head"]] if by_head else [row["position"], token_text(row["token"])]
        rows.append((row["layer"], *at, row["value"], row["effect"]))
    return Table(
        (
            Column("layer"),
            *place,
            Column("metric", note="with this patch", spell=_metric),
            Column("effect", note="0: the run that is patched, 1: the other run", spell=_effect),
        ),
        tuple(rows),
        title="effect of each patch",
        keys=1 + len(place),
    )


def _metric(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.4f}"


def _effect(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:+.3f}"
