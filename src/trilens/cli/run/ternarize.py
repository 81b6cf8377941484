"""`trilens ternarize`: a ternary copy of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.evaluate import Sample
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.cli.console import check_file, show_result, shown_progress, timed
from trilens.cli.groups import Coding, Fitting
from trilens.cli.pages import write_page
from trilens.cli.run.text import documents_of
from trilens.errors import UsageError
from trilens.models.tokenizer_files import read_tokenizer
from trilens.report.text.ternary import REPORT_HEAD, print_report

__all__ = ["run"]

_CALIBRATIONS = {"max_tokens": "tokens", "seq_length": "length"}  # names that `Calibration` has


def run(
    *,
    model: str,
    output: Path,
    to: Any,
    coding: Coding,
    ignore: list[str] | None,
    only: list[str] | None,
    scale_dtype: Any,
    storage: Any,
    rotate: bool,
    plan: Path | None,
    calibrate: str | None,
    evaluate: str | None,
    fitting: Fitting,
    field: str,
    revision: str | None,
    tokenizer: Path | None,
    dry_run: bool,
    report: Path | None,
    format: str,
) -> None:
    """Write the copy, print the report."""
    check_file(report)
    options: dict[str, Any] = {
        **asdict(coding),
        "keep": tuple(ignore or ()),
        "only": tuple(only or ()),
        "scale_dtype": scale_dtype,
        "storage": storage,
        "rotate": rotate,
    }
    entries = TernaryPlan(**options) if plan is None else _read_plan(plan, options)
    fitted = {_CALIBRATIONS.get(name, name): value for name, value in asdict(fitting).items()}
    read = partial(documents_of, field=field)
    held_out = () if evaluate is None else read(evaluate)
    calibration = sample = None
    given = {name: value for name, value in fitted.items() if value is not None}
    if calibrate is not None:
        calibration = Calibration(read(calibrate), held_out, **given)
    elif given:
        raise UsageError(
            "--max-tokens, --seq-length, --batch-size, --seed and --max-perplexity-ratio are "
            "options of a calibration: add --calibrate TEXT"
        )
    elif evaluate is not None:
        sample = Sample(Path(evaluate).name, held_out)
    with timed(None if dry_run else output), shown_progress() as progress:
        found = ternarize(
            model,
            output,
            plan=entries,
            format=to,
            dry_run=dry_run,
            revision=revision,
            tokenizer=None if tokenizer is None else read_tokenizer(tokenizer),
            calibration=calibration,
            sample=sample,
            progress=progress,
        )
    show_result(found, print_report, format=format, head=REPORT_HEAD)
    if report is not None:
        write_page(report, found, {"model": model, "output": str(output)})


def _read_plan(file: Path, options: dict[str, Any]) -> TernaryPlan:
    """The plan of a file; options beside it would contradict it."""
    plain = TernaryPlan()
    given = [name for name, value in options.items() if value not in {getattr(plain, name), None}]
    if given:
        option = "ignore" if given[0] == "keep" else given[0].replace("_", "-")
        raise UsageError(f"--plan and --{option} are both given: the plan file says it all")
    return TernaryPlan.load(file)
