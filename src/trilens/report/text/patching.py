"""Patching sweeps as tables for a terminal: a row per position or head, a column per layer."""

from __future__ import annotations

import math

from rich.console import Console

from trilens.analysis.patch_result import PatchSweep
from trilens.report.text.tables import Column, print_line, print_table

__all__ = ["print_patch"]

_WAYS = {
    "denoise": "clean values into the corrupted run",
    "noise": "corrupted values into the clean run",
}


def print_patch(found: PatchSweep, console: Console) -> None:
    """Draw the effects, and what they are of."""
    print_line(console, f"{found.site} by {found.by} · {_WAYS[found.direction]} · {found.method}")
    print_line(
        console,
        f"metric {found.base:.4f} in the run that is patched (effect 0), {found.target:.4f} in "
        "the other (effect 1)",
    )
    console.print()
    keys: list[Column | str] = ["head"]
    if found.by == "position":
        keys = ["position", Column("token", left=True, fold=16)]
    effects = found.effects
    rows = []
    for column, place in enumerate(found.places):
        names = [str(place)] if found.by == "head" else [str(place), repr(found.tokens[place])]
        rows.append([*names, *(_effect(float(each)) for each in effects[:, column])])
    print_table(console, [*keys, *(f"layer {i}" for i in found.layers)], rows, keys=len(keys))
    if found.by == "position" and any(math.isnan(each) for each in effects.flat):
        console.print()
        why = "no partner in the other prompt" + ("" if found.complete else ", or not run")
        print_line(console, f"– {why}", style="dim")


def _effect(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}"
