"""`trilens compare`: a model and one derived from it on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import typer

from trilens.analysis.comparison.conditions import Condition, parse_condition
from trilens.analysis.comparison.rows import Row
from trilens.analysis.comparison.run import CompareOptions, compare
from trilens.analysis.comparison.saving import check_place
from trilens.cli.console import show_result, shown_progress, timed
from trilens.cli.groups import Loading
from trilens.cli.run.prompts import open_lens
from trilens.cli.run.text import documents_of
from trilens.cli.streams import say
from trilens.report.text.comparison import print_comparison
from trilens.text.token_blocks import token_blocks

__all__ = ["run"]

_MET = 3


def run(
    *,
    before: str,
    after: str,
    data: str,
    output: Path | None,
    fail_if: list[str] | None,
    lens: Literal["last", "all", "none"],
    max_tokens: int | None,
    seq_length: int,
    batch_size: int,
    seed: int | None,
    field: str,
    format: str,
    dtype: Any,
    device_map: str | None,
    trust_remote_code: bool,
) -> None:
    """Compare, print, save, and check the conditions."""
    conditions = [parse_condition(text) for text in fail_if or ()]
    if output is not None:
        check_place(output)
    documents = documents_of(data, field=field)
    with timed(output):
        loading = Loading(dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        left, right = (open_lens(name, loading) for name in (before, after))
        blocks = token_blocks(
            left.tokenizer or right.tokenizer,
            documents,
            length=seq_length,
            limit_tokens=max_tokens,
        )
        options = CompareOptions(lens=lens, batch_size=batch_size, seed=seed or 0)
        with shown_progress() as progress:
            found = compare(left, right, blocks, options=options, progress=progress)
        if output is not None:
            found.save(output)
        show_result(found, print_comparison, format=format, pipe_width=160)
    met = [(each, each.met_by(found.rows)) for each in conditions]
    for condition, rows in met:
        if rows:
            say(f"trilens: {_words(condition, rows)}", err=True)
    if any(rows for _, rows in met):
        raise typer.Exit(_MET)


def _words(condition: Condition, rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: abs(condition.value(row)))
    place = "" if worst.layer is None else f" of layer {worst.layer}"
    place += "" if worst.head is None else f", head {worst.head}"
    module = "" if worst.module == "output" else f" ({worst.module})"
    return (
        f"{condition.text} holds in {len(rows)} row{'s' if len(rows) > 1 else ''}: "
        f"{condition.metric}{place}{module} is {condition.value(worst):g}"
    )
