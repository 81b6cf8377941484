"""`trilens evaluate`: perplexity, loops, damage and tasks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trilens.analysis.harness import run_tasks
from trilens.analysis.model_evaluation import ModelEvaluation, evaluate_texts
from trilens.checkpoint.evaluate import Sample
from trilens.cli.console import check_file, show_result, status, timed
from trilens.cli.groups import Loading
from trilens.cli.run.prompts import open_lens
from trilens.cli.run.text import documents_of, named_text
from trilens.errors import UsageError
from trilens.report.text.evaluation import print_evaluation

__all__ = ["run"]

_HEAD = {"format": "trilens.evaluation", "version": 1}


def run(
    *,
    model: str,
    evaluate: Sequence[str] | None,
    made_from: str | None,
    task: Sequence[str] | None,
    limit: int | None,
    max_tokens: int,
    seed: int | None,
    field: str,
    output: Path | None,
    format: str,
    loading: Loading,
) -> None:
    """Measure and print."""
    check_file(output, format)
    if not evaluate and not task:
        raise UsageError("nothing to evaluate on: give a text (--evaluate TEXT) or a task (--task)")
    if made_from is not None and not evaluate:
        raise UsageError(
            f"--made-from {made_from} is compared on texts: give one (--evaluate TEXT)"
        )
    if limit is not None and not task:
        raise UsageError("--limit is an option of tasks: add --task NAME")
    samples = [
        Sample(name, documents_of(text, field=field))
        for name, text in map(named_text, evaluate or ())
    ]
    with timed(output):
        lens = open_lens(model, loading)
        other = (
            None
            if made_from is None
            else open_lens(made_from, replace(loading, revision=None, gguf_file=None))
        )
        with status("measuring"):
            texts = evaluate_texts(lens, samples, against=other, max_tokens=max_tokens)
        tasks = run_tasks(lens, task, limit=limit, seed=seed or 0) if task else {}
        found = ModelEvaluation(model, made_from, texts, tasks)
        show_result(found, print_evaluation, format=format, head=_HEAD, file=output)
