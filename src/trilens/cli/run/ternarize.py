"""`trilens ternarize`: a ternary copy of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from trilens.checkpoint.calibration.cost import cost_of
from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.calibration.own_text import SELF, OwnText
from trilens.checkpoint.evaluate import Sample
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.job import read_job
from trilens.checkpoint.pipeline import ternarize
from trilens.cli.console import check_file, show_result, shown_progress, timed
from trilens.cli.groups import Coding, Fitting
from trilens.cli.pages import write_page
from trilens.cli.run.text import documents_of, named_text
from trilens.cli.streams import say
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
    embeddings: Any,
    rotate: bool,
    plan: Path | None,
    calibrate: list[str] | None,
    evaluate: list[str] | None,
    fitting: Fitting,
    field: str,
    revision: str | None,
    tokenizer: Path | None,
    workers: int,
    ray: str | None,
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
        "embeddings": embeddings,
    }
    entries = TernaryPlan(**options) if plan is None else _read_plan(plan, options)
    fitted = {_CALIBRATIONS.get(name, name): value for name, value in asdict(fitting).items()}
    given = {name: value for name, value in fitted.items() if value is not None}
    read = partial(documents_of, field=field)
    samples = [Sample(name, read(text)) for name, text in map(named_text, evaluate or ())]
    calibration, bound = None, None
    if calibrate or entries.calibrated:
        # A calibrated rule without a text is fitted on what the model writes.
        calibration = _calibration(calibrate or [SELF], samples, read, given)
        samples = []
    else:
        bound = given.pop("max_perplexity_ratio", None) if samples else None
        if given:
            raise UsageError(
                "--max-tokens, --seq-length, --batch-size, --seed, --effort, --device and "
                "--max-perplexity-ratio are options of a calibration: add --calibrate TEXT "
                "(the last one also goes with --evaluate TEXT)"
            )
    chosen = None if tokenizer is None else read_tokenizer(tokenizer)
    if calibration is not None and to == "trilens":
        job = read_job(model, entries, revision=revision, tokenizer=chosen)
        if not job.keeps_trits:  # else there is nothing to calibrate, and it is refused
            say(cost_of(job, calibration).sentence, err=True)
    with timed(None if dry_run else output), shown_progress() as progress:
        found = ternarize(
            model,
            output,
            plan=entries,
            format=to,
            dry_run=dry_run,
            revision=revision,
            tokenizer=chosen,
            calibration=calibration,
            sample=samples,
            max_perplexity_ratio=bound,
            workers=workers,
            ray=ray,
            progress=progress,
        )
    show_result(found, print_report, format=format, head=REPORT_HEAD)
    if report is not None:
        write_page(report, found, {"model": model, "output": str(output)})


def _calibration(
    sources: list[str],
    samples: list[Sample],
    read: Callable[[str], tuple[str, ...]],
    given: dict[str, Any],
) -> Calibration:
    """The calibration of the texts that were named; a file called "self" comes before the word."""
    own = [source for source in sources if source == SELF and not Path(source).exists()]
    texts = tuple(text for source in sources if source not in own for text in read(source))
    written = OwnText() if own else None
    return Calibration(texts, tuple(samples), own_text=written, **given)


def _read_plan(file: Path, options: dict[str, Any]) -> TernaryPlan:
    """The plan of a file; options of the blocks' matrices beside it would contradict it."""
    plain, embeddings = TernaryPlan(), options["embeddings"]
    others = {name: value for name, value in options.items() if name != "embeddings"}
    given = [name for name, value in others.items() if value not in {getattr(plain, name), None}]
    if given:
        option = "ignore" if given[0] == "keep" else given[0].replace("_", "-")
        raise UsageError(f"--plan and --{option} are both given: the plan file says it all")
    plan = TernaryPlan.load(file)
    return plan if embeddings == "keep" else replace(plan, embeddings=embeddings)
