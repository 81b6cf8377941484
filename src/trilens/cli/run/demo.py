"""`trilens demo`: the included models on one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from trilens.analysis.inspection import Inspection
from trilens.cli.console import check_file, show, show_json, timed
from trilens.cli.pages import write_page
from trilens.cli.run.inspect import inspect_page, inspect_prompt
from trilens.cli.run.prompts import open_lens, prompt_text
from trilens.demo import DEMO_MODELS, demo_path, training_record
from trilens.report.making import joined
from trilens.report.page import Page, Section
from trilens.report.text.demo import print_side_by_side
from trilens.report.text.inspection import print_inspection
from trilens.report.views.demo import side_by_side

__all__ = ["DEMO_PROMPT", "run"]

DEMO_PROMPT = "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial("


def run(*, prompt: str | None, top_k: int, report: Path | None, format: str) -> None:
    """Inspect the three, then show them side by side."""
    check_file(report)
    text = DEMO_PROMPT if prompt is None else prompt_text(prompt)
    shown: dict[str, Inspection] = {}
    pages: dict[str, Page] = {}
    for name in DEMO_MODELS:
        lens = open_lens(str(demo_path(name)))
        effective = bool(lens.effective_layers)
        shown[name] = inspect_prompt(lens, f"demo {name}", text, None, top_k, effective=effective)
        if report is not None:
            pages[name] = inspect_page(lens, text, None)
    records = {name: training_record(name) for name in shown}
    if format == "json":
        show_json([inspection.to_dict() for inspection in shown.values()])
    else:
        show(partial(_draw, shown, records))
    if report is not None:
        first = Section("Side by side", (side_by_side(shown, records),))
        with timed(report):
            write_page(report, joined("demo models", pages, first))


def _draw(
    shown: Mapping[str, Inspection], records: Mapping[str, Mapping[str, Any]], console: Console
) -> None:
    for inspection in shown.values():
        print_inspection(inspection, console)
        console.print()
    print_side_by_side(shown, records, console)
