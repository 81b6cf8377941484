"""`trilens compare`: a model and one derived from it on the same text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, Unpack

import typer

from trilens.analysis.comparison.conditions import Condition, parse_condition
from trilens.analysis.comparison.rows import Row
from trilens.analysis.comparison.run import CompareOptions, compare
from trilens.analysis.comparison.saving import check_place
from trilens.cli.console import show, show_json, shown_progress, timed
from trilens.cli.run.prompts import Loading, open_lens
from trilens.cli.run.text import documents_of
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
    **loading: Unpack[Loading],
) -> None:
    """Compare, print, save, and check the conditions."""
    conditions = [parse_condition(text) for text in fail_if or ()]
    if output is not None:
        check_place(output)
    documents = documents_of(data, field=field)
    with timed(output):
        left, right = (open_lens(name, **loading) for name in (before, after))
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
        if format == "json":
            show_json(found.to_dict())
        else:
            show(partial(print_comparison, found), pipe_width=160)
    met = [(each, each.met_by(found.rows)) for each in conditions]
    for condition, rows in met:
        if rows:
            typer.echo(f"trilens: {_words(condition, rows)}", err=True)
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
