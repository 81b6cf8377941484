"""`trilens sensitivity`: which layers and matrices ternary weights damage most."""

from __future__ import annotations

from dataclasses import asdict

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.cli.console import show_result, shown_progress
from trilens.cli.groups import Coding, Loading, Sampling
from trilens.cli.run.dense import open_dense
from trilens.cli.run.text import documents_of
from trilens.planning.sensitivity import measure_sensitivity
from trilens.report.text.sensitivity import print_sensitivity

__all__ = ["run"]

_HEAD = {"format": "trilens.sensitivity", "version": 1}


def run(
    *,
    model: str,
    data: str,
    coding: Coding,
    each_matrix: bool,
    predict: bool,
    sampling: Sampling,
    loading: Loading,
    format: str,
) -> None:
    """Measure and print."""
    rule = MatrixPlan(**asdict(coding))
    documents = documents_of(data, field=sampling.field)
    dense = open_dense(model, loading)
    blocks = dense.blocks(documents, sampling)
    with shown_progress() as progress:
        found = measure_sensitivity(
            dense.lens,
            blocks,
            rule=rule,
            headers=dense.headers,
            each_matrix=each_matrix,
            predict=predict,
            progress=progress,
        )
    show_result(found, print_sensitivity, format=format, head=_HEAD)
