"""`trilens demo`: the included models on one prompt."""

from __future__ import annotations

from rich.console import Console

from trilens.analysis.inspection import Inspection
from trilens.cli.console import show, show_json
from trilens.cli.run.inspect import inspect_prompt
from trilens.cli.run.prompts import open_lens, prompt_text
from trilens.demo import DEMO_MODELS, demo_path, training_record
from trilens.report.text.demo import print_side_by_side
from trilens.report.text.inspection import print_inspection

__all__ = ["DEMO_PROMPT", "run"]

DEMO_PROMPT = "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial("


def run(*, prompt: str | None, top_k: int, format: str) -> None:
    """Inspect the three, then show them side by side."""
    text = DEMO_PROMPT if prompt is None else prompt_text(prompt)
    shown: dict[str, Inspection] = {}
    for name in DEMO_MODELS:
        lens = open_lens(str(demo_path(name)))
        effective = bool(lens.effective_layers)
        shown[name] = inspect_prompt(lens, f"demo {name}", text, None, top_k, effective=effective)
    if format == "json":
        show_json([inspection.to_dict() for inspection in shown.values()])
        return

    def draw(console: Console) -> None:
        for inspection in shown.values():
            print_inspection(inspection, console)
            console.print()
        print_side_by_side(shown, {name: training_record(name) for name in shown}, console)

    show(draw)
