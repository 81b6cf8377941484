"""`trilens families`: the last sweep of transformers' model types."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from trilens.cli.console import show_result
from trilens.errors import UsageError
from trilens.models.families import load_families
from trilens.report.text.families import print_families

__all__ = ["run"]


def run(*, type: str | None, format: str) -> None:
    """Print all types, or those whose name contains `type`."""
    table = load_families()
    if type is not None:
        rows = tuple(row for row in table.rows if type.lower() in row.model_type)
        if not rows:
            raise UsageError(
                f"type {type!r} is in none of the {len(table.rows)} names: trilens families lists "
                "them"
            )
        table = replace(table, rows=rows)
    show_result(table, partial(print_families, whole=type is not None), format=format)
