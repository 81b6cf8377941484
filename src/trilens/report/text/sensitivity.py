"""Sensitivity and plans as tables for a terminal."""

from __future__ import annotations

from rich.console import Console

from trilens.planning.result import Planned
from trilens.planning.sensitivity import Sensitivity
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.planning import (
    plan_sentence,
    plan_table,
    sensitivity_tables,
    sensitivity_title,
)

__all__ = ["print_plan", "print_sensitivity"]


def print_sensitivity(found: Sensitivity, console: Console) -> None:
    """Draw a table for each kind of part that was measured."""
    print_line(console, sensitivity_title(found))
    for table in sensitivity_tables(found).values():
        console.print()
        print_line(console, head=table.title)
        print_rows(console, table)
        for note in table.notes:
            print_line(console, note)
    console.print()
    print_line(console, f"weights restored, SHA-256 {found.checksum[:16]}…", style="dim")


def print_plan(planned: Planned, console: Console) -> None:
    """Draw what each matrix becomes, and what the whole was measured to do."""
    print_rows(console, plan_table(planned))
    console.print()
    print_line(console, plan_sentence(planned))
