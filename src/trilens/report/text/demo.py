"""The demo models next to each other, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from trilens.analysis.inspection import Inspection
from trilens.report.text.tables import print_rows
from trilens.report.views.demo import side_by_side

__all__ = ["print_side_by_side"]


def print_side_by_side(
    inspections: Mapping[str, Inspection],
    records: Mapping[str, Mapping[str, Any]],
    console: Console,
) -> None:
    """Draw what `side_by_side` says."""
    print_rows(console, side_by_side(inspections, records))
