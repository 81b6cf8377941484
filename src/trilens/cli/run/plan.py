"""`trilens plan`: ternary weights under a budget of bits or a bound on the damage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trilens.checkpoint.calibration.own_text import SELF, OwnText, write_text
from trilens.cli.console import check_file, show_result, shown_progress, status, timed
from trilens.cli.groups import Loading, Sampling
from trilens.cli.pages import model_facts, write_page
from trilens.cli.run.dense import Dense, open_dense
from trilens.cli.run.text import documents_of
from trilens.errors import DamageError, UsageError
from trilens.planning.calibrated_candidates import hessians_of, with_text
from trilens.planning.candidates import data_free
from trilens.planning.matrices import find_matrices
from trilens.planning.planning import Candidates, make_plan
from trilens.planning.result import PlanOptions
from trilens.report.text.sensitivity import print_plan
from trilens.text.token_blocks import set_aside

__all__ = ["run"]

_HELD_OUT_TIMES = 4  # held-out tokens for each token that costs are measured on


def run(
    *,
    model: str,
    data: str,
    output: Path | None,
    budget_bits: float | None,
    max_perplexity_ratio: float | None,
    calibrate: str | None,
    evaluate: str | None,
    costs: Any,
    storage: Any,
    scale_dtype: Any,
    sampling: Sampling,
    loading: Loading,
    report: Path | None,
    format: str,
) -> None:
    """Make a plan, print it, and write it where it keeps within the bound."""
    options = PlanOptions(
        budget_bits=budget_bits,
        max_perplexity_ratio=max_perplexity_ratio,
        costs=costs,
        storage=storage,
        scale_dtype=scale_dtype,
    )
    check_file(output)
    check_file(report)
    documents = documents_of(data, field=sampling.field)
    if evaluate is None:
        documents, held_out = set_aside(documents)
    else:
        held_out = documents_of(evaluate, field=sampling.field)
    with timed(output):
        dense = open_dense(model, loading)
        blocks = dense.blocks(documents, sampling)
        candidates: Candidates = data_free
        if calibrate is not None:
            fitted = _fitted_on(dense, calibrate, documents, data, held_out, sampling)
            matrices = find_matrices(dense.lens, dense.headers)
            with status("taking the Hessians of the matrices' inputs"):
                hessians = hessians_of(dense.lens, matrices, fitted)
            candidates = with_text(hessians)
        with shown_progress() as progress:
            planned = make_plan(
                dense.lens,
                blocks,
                dense.blocks(held_out, sampling, times=_HELD_OUT_TIMES),
                options=options,
                headers=dense.headers,
                candidates=candidates,
                progress=progress,
            )
        show_result(planned, print_plan, format=format)
        if report is not None:
            write_page(report, planned, model_facts(model, loading))
        if not planned.holds:
            raise DamageError(
                f"damage is beyond the bound: perplexity × {planned.damage.perplexity_ratio:.3f}, "
                f"--max-perplexity-ratio is {max_perplexity_ratio}; no plan was written; allow "
                "more bits or more damage"
            )
        if output is not None:
            planned.save(output)


def _fitted_on(
    dense: Dense,
    calibrate: str,
    documents: Sequence[str],
    data: str,
    held_out: Sequence[str],
    sampling: Sampling,
) -> tuple[Tensor, ...]:
    """Token blocks of --calibrate: of --data without what was set aside of it, or written now.

    Raises:
        UsageError: all documents are held out.
        GenerationError: the model is to write the text, and writes none.
    """
    if calibrate == SELF and not Path(calibrate).exists():
        with status("the model writes its calibration text"):
            return write_text(
                dense.lens.model,
                dense.lens.tokenizer,
                OwnText(),
                rows=math.ceil(sampling.max_tokens / sampling.seq_length),
                length=sampling.seq_length,
                seed=sampling.seed or 0,
            )
    texts = documents if calibrate == data else documents_of(calibrate, field=sampling.field)
    texts = tuple(text for text in texts if text not in held_out)
    if not texts:
        raise UsageError(
            f"all documents of --calibrate {calibrate} are held out: give other text for "
            "--calibrate or --evaluate"
        )
    return dense.blocks(texts, sampling)
