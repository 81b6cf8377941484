"""`trilens compare`: a model and one or several derived from it on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import typer
from torch import Tensor

from trilens.analysis.comparison.conditions import Condition, parse_condition
from trilens.analysis.comparison.rows import Row
from trilens.analysis.comparison.run import CompareOptions, compare
from trilens.analysis.comparison.saving import check_place
from trilens.analysis.comparison.series import ComparisonSeries
from trilens.cli.console import check_file, show_result, shown_progress, timed
from trilens.cli.groups import Loading
from trilens.cli.pages import is_page, write_page
from trilens.cli.run.prompts import open_lens
from trilens.cli.run.text import documents_of
from trilens.cli.streams import say
from trilens.report.text.comparison import print_comparison
from trilens.report.text.series import print_series
from trilens.text.token_blocks import token_blocks

__all__ = ["run"]

_MET = 3


def run(
    *,
    before: str,
    after: list[str],
    data: str,
    output: Path | None,
    fail_if: list[str] | None,
    lens: Literal["last", "all", "none"],
    max_tokens: int | None,
    seq_length: int,
    batch_size: int,
    seed: int | None,
    field: str,
    report: Path | None,
    format: str,
    dtype: Any,
    device_map: str | None,
    trust_remote_code: bool,
    attn_implementation: str | None,
    tokenizer: Path | None,
) -> None:
    """Compare, print, save, and check the conditions."""
    conditions = [parse_condition(text) for text in fail_if or ()]
    check_file(report)
    if is_page(output):
        check_file(output, format)
    elif output is not None:
        check_place(output)
    documents = documents_of(data, field=field)
    with timed(output):
        loading = Loading(
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            tokenizer=tokenizer,
        )
        left = open_lens(before, loading)
        options = CompareOptions(lens=lens, batch_size=batch_size, seed=seed or 0)
        blocks: Sequence[Tensor] = ()
        steps = []
        for name in after:
            right = open_lens(name, loading)
            blocks = blocks or token_blocks(
                left.tokenizer or right.tokenizer,
                documents,
                length=seq_length,
                limit_tokens=max_tokens,
            )
            with shown_progress() as progress:
                steps.append(compare(left, right, blocks, options=options, progress=progress))
        found = ComparisonSeries(tuple(steps)) if len(steps) > 1 else steps[0]
        for page in (report, output if is_page(output) else None):
            if page is not None:
                write_page(page, found)
        if output is not None and not is_page(output):
            found.save(output)
        if isinstance(found, ComparisonSeries):
            show_result(found, print_series, format=format, pipe_width=160)
        else:
            show_result(found, print_comparison, format=format, pipe_width=160)
    met = [
        (step.after.name, condition, condition.met_by(step.rows))
        for step in steps
        for condition in conditions
    ]
    for name, condition, rows in met:
        if rows:
            place = f"{name}: " if len(steps) > 1 else ""
            say(f"trilens: {place}{_words(condition, rows)}", err=True)
    if any(rows for *_, rows in met):
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
