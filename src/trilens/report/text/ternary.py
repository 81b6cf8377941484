"""What `ternarize` and `validate` found, as text for a terminal."""

from __future__ import annotations

from types import MappingProxyType

from rich.console import Console

from trilens.checkpoint.format.report import TernaryReport
from trilens.report.text.tables import print_line, print_rows
from trilens.report.views.ternary import gguf_sentence, ternary_sentence, ternary_table

__all__ = ["GGUF_HEAD", "REPORT_HEAD", "gguf_sentence", "print_report"]

REPORT_HEAD = MappingProxyType({"format": "trilens.ternary_report", "version": 1})
"""What the JSON of a `TernaryReport` begins with."""

GGUF_HEAD = MappingProxyType({"format": "trilens.gguf_report", "version": 1})
"""What the JSON of a `GgufReport` begins with."""


def print_report(report: TernaryReport, console: Console) -> None:
    """Draw a row for each matrix, the sizes and the verdict."""
    print_rows(console, ternary_table(report))
    console.print()
    print_line(console, ternary_sentence(report))
    print_line(console, report.verdict)
