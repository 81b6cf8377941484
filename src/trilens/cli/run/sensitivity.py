"""`trilens sensitivity`: which layers and matrices ternary weights damage most."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.cli.console import check_file, show_result, shown_progress, timed
from trilens.cli.groups import Coding, Loading, Sampling
from trilens.cli.pages import model_facts
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
    output: Path | None,
    format: str,
) -> None:
    """Measure and print."""
    check_file(output, format)
    rule = MatrixPlan(**asdict(coding))
    documents = documents_of(data, field=sampling.field)
    with timed(output):
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
        show_result(
            found,
            print_sensitivity,
            format=format,
            head=_HEAD,
            file=output,
            facts=model_facts(model, loading),
        )
