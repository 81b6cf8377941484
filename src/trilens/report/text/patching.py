"""Patching sweeps as tables for a terminal: a row per position or head, a column per layer."""

from __future__ import annotations

import math

from rich.console import Console

from trilens.analysis.patch_result import PatchSweep
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.patching import patch_grid, patch_way

__all__ = ["print_patch"]


def print_patch(found: PatchSweep, console: Console) -> None:
    """Draw the effects, and what they are of."""
    for line in patch_way(found):
        print_line(console, line)
    console.print()
    print_rows(console, patch_grid(found))
    if found.by == "position" and any(math.isnan(each) for each in found.effects.flat):
        console.print()
        why = "no partner in the other prompt" + ("" if found.complete else ", or not run")
        print_line(console, f"– {why}", style="dim")
