"""`trilens sensitivity`: which layers and matrices ternary weights damage most."""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.cli.console import show, show_json, shown_progress
from trilens.cli.run.dense import open_dense
from trilens.cli.run.prompts import Loading
from trilens.cli.run.text import documents_of
from trilens.planning.sensitivity import measure_sensitivity
from trilens.report.text.sensitivity import print_sensitivity

__all__ = ["run"]

_HEAD = {"format": "trilens.sensitivity", "version": 1}


def run(
    *,
    model: str,
    data: str,
    rule: Any,
    group_size: int | None,
    per: Any,
    each_matrix: bool,
    predict: bool,
    max_tokens: int,
    seq_length: int,
    seed: int | None,
    field: str,
    format: str,
    **loading: Unpack[Loading],
) -> None:
    """Measure and print."""
    entry = MatrixPlan(rule=rule, per=per, group_size=group_size)
    documents = documents_of(data, field=field)
    dense = open_dense(model, **loading)
    blocks = dense.blocks(documents, length=seq_length, tokens=max_tokens, seed=seed)
    with shown_progress() as progress:
        found = measure_sensitivity(
            dense.lens,
            blocks,
            rule=entry,
            headers=dense.headers,
            each_matrix=each_matrix,
            predict=predict,
            progress=progress,
        )
    if format == "json":
        show_json({**_HEAD, **found.to_dict()})
    else:
        show(partial(print_sensitivity, found))
