"""The commands `ternarize` and `validate`.

Exit codes: 0 done; 1 `validate` found damage, or the output can't be written; 2 an argument is
wrong, the source can't be used, or there is nothing to validate; 3 more damage than --max-damage
allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from trilens.checkpoint.calibration.options import Calibration
from trilens.checkpoint.evaluate import Sample
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import TensorReport, TernaryReport
from trilens.checkpoint.gguf import GgufReport, validate_gguf
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.cli.console import DebugOption, FormatOption, console, one_line_errors
from trilens.cli.text_option import documents_of
from trilens.errors import CorruptFileError, UsageError
from trilens.io.json import json_text
from trilens.progress import Step

__all__ = ["register"]

_PRINTED = ("table", "json")


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("ternarize")(_ternarize)
    app.command("validate")(_validate)


def _ternarize(
    source: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.", metavar="SRC")],
    out: Annotated[Path, typer.Option("-o", "--output", help="New directory, or new .gguf file.")],
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            help="absmean, absmean_refit, twn, exact, asymmetric or planes; with --calibrate also "
            "gptq, gptq_planes, best or best_planes.",
        ),
    ] = "absmean",
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights that share a scale along a row.")
    ] = None,
    per: Annotated[
        str | None, typer.Option("--per", help="One scale per tensor, row or group.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Regular expression of tensors to keep; may be repeated."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Regular expression of the only matrices to code; repeatable."),
    ] = None,
    scale_dtype: Annotated[
        str, typer.Option("--scale-dtype", help="float16, bfloat16 or float32.")
    ] = "float32",
    storage: Annotated[
        str, typer.Option("--storage", help="two_bit, or compact: 1.6 bits, scales in their dtype.")
    ] = "two_bit",
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="A plan file of trilens plan, instead of the options above."),
    ] = None,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Turn weights and inputs by a Hadamard rotation."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            help="Text to measure source and result on: a file, a folder, stdlib, or demo (the "
            "demo model's held-out text).",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sizes, read headers only, write nothing.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            help="Text for calibrated rules and the damage: a file (text, JSONL, Parquet), a "
            "folder, or stdlib.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            help="Text to measure the damage on, never calibrated on; also demo. "
            "[default: a tenth of the documents]",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", help="At most. [default: 65536]")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--calibration-length", help="Tokens of a block. [default: 512]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of what is drawn from the text. [default: 0]")
    ] = None,
    max_damage: Annotated[
        float | None,
        typer.Option(
            "--max-damage", help="Largest ratio of perplexities that is written; else exit code 3."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="What to write: trilens (a directory), gguf-tq2_0, gguf-tq1_0 or gguf-q2_0 (a "
            "file for llama.cpp); and how to print: table or json. May be given twice.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write a ternary copy of a checkpoint.

    Prints each matrix's weight error and, with --sample, the perplexity before and after. A model
    that was not trained for ternary weights is usually unusable afterwards.
    """
    with one_line_errors(
        debug, stopped="stopped; run the same command again (a directory goes on from here)"
    ):
        options: dict[str, Any] = {
            "rule": rule,
            "group_size": group_size,
            "per": per,
            "keep": tuple(keep or ()),
            "only": tuple(only or ()),
            "scale_dtype": scale_dtype,
            "storage": storage,
            "rotate": rotate,
        }
        plan = TernaryPlan(**options) if plan_file is None else _read_plan(plan_file, options)
        written, printed = _formats(formats or [])
        wanted = {
            "tokens": tokens,
            "length": length,
            "seed": seed,
            "max_perplexity_ratio": max_damage,
        }
        calibration = _calibration(calibrate, evaluate, wanted)
        with _shown_progress() as say:
            report = ternarize(
                source,
                out,
                plan=plan,
                format=written,
                dry_run=dry_run,
                revision=revision,
                calibration=calibration,
                sample=None if sample is None else _sample(sample),
                progress=say,
            )
        _print(report, printed)


def _formats(given: list[str]) -> tuple[Any, str]:
    """What to write and how to print it, each named once or not at all."""
    printed = [name for name in given if name in _PRINTED]
    written = [name for name in given if name not in _PRINTED]
    if len(printed) > 1 or len(written) > 1:
        raise UsageError(
            f"--format is given as {' and '.join(given)}: name one thing to write, and table or "
            "json at most once"
        )
    return (written or ["trilens"])[0], (printed or ["table"])[0]


def _read_plan(file: Path, options: dict[str, Any]) -> TernaryPlan:
    """The plan of a file; options beside it would contradict it."""
    plain = TernaryPlan()
    given = [name for name, value in options.items() if value not in {getattr(plain, name), None}]
    if given:
        raise UsageError(
            f"--plan and --{given[0].replace('_', '-')} are both given: the plan file says it all"
        )
    return TernaryPlan.load(file)


def _sample(word: str) -> Sample:
    """The text behind `--sample`; a file of that name comes before a word."""
    return Sample(Path(word).name, documents_of(word))


def _calibration(
    calibrate: str | None, evaluate: str | None, options: dict[str, Any]
) -> Calibration | None:
    given = {name: value for name, value in options.items() if value is not None}
    if calibrate is None:
        if evaluate is not None or given:
            raise UsageError(
                "--evaluate, --calibration-tokens, --calibration-length, --seed and --max-damage "
                "are options of a calibration: add --calibrate FILE, FOLDER or stdlib"
            )
        return None
    apart = () if evaluate is None else documents_of(evaluate)
    return Calibration(documents_of(calibrate), apart, **given)


@contextmanager
def _shown_progress() -> Iterator[Callable[[Step], None] | None]:
    """A bar on a terminal, with the time left; nothing where stderr is no terminal."""
    shown = Console(stderr=True)
    if not shown.is_terminal:
        yield None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"),
        console=shown, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("reading", total=None, left="")

        def say(now: Step) -> None:
            left = "" if now.seconds_left is None else f"{now.seconds_left:.0f} s left"
            bar.update(task, total=now.total, completed=now.done, description=now.what, left=left)

        yield say


def _validate(
    path: Annotated[
        Path,
        typer.Argument(help="Directory or GGUF file that ternarize wrote.", metavar="OUT"),
    ],
    output: FormatOption = "table",
    debug: DebugOption = False,
) -> None:
    """Check a ternary checkpoint or a GGUF file, every byte."""
    with one_line_errors(debug, failures=(CorruptFileError,)):
        if path.suffix == ".gguf" and not path.is_dir():
            _print_gguf(validate_gguf(path), path, output)
            return
        report = validate(path)
        if output == "json":
            typer.echo(json_text(report.to_dict()))
            return
        typer.echo(
            f"{path}: undamaged. {len(report.coded)} matrices hold legal codes and finite scales; "
            "all files have the size and hash that the manifest lists."
        )
        typer.echo(report.verdict)


def _print_gguf(report: GgufReport, path: Path, output: str) -> None:
    if output == "json":
        typer.echo(json_text(report.to_dict()))
        return
    hashed = (
        "the tensors have the hash that the file names"
        if report.hash_checked
        else (
            "the file names no hash of its tensors, so that damage to kept tensors would not show"
        )
    )
    typer.echo(
        f"{path}: undamaged. Architecture {report.architecture}; {len(report.coded)} of "
        f"{len(report.tensors)} tensors hold trits, with legal codes and finite scales; "
        f"{report.bits_per_weight:.2f} bits per weight over all tensors; {hashed}."
    )


def _print(report: TernaryReport, output: str) -> None:
    if output == "json":
        typer.echo(json_text(report.to_dict()))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("matrix", overflow="fold")
    calibrated = report.damage is not None
    columns = ["shape", "bits/weight", "relative error"]
    for name in (*columns, *(["output error"] if calibrated else []), "zeros"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    for tensor in report.matrices:
        table.add_row(*_cells(tensor, calibrated))
    console(pipe_width=140).print(table)
    absent = sum(tensor.outcome == "left out" for tensor in report.tensors)
    kept = len(report.tensors) - len(report.coded) - absent
    typer.echo(
        f"{len(report.coded)} matrices coded, {kept} tensors kept ({len(report.fallbacks)} of them "
        f"matrices), {absent} left out; {report.size_bytes_before:,} → {report.size_bytes:,} "
        f"bytes, {report.bits_per_weight:.2f} bits per weight over all tensors."
    )
    typer.echo(report.verdict)


def _cells(tensor: TensorReport, calibrated: bool) -> tuple[str, ...]:
    error, zeros = tensor.relative_error, tensor.sparsity
    return (
        tensor.name,
        "×".join(map(str, tensor.shape)),
        f"{tensor.bits_per_weight:.3f}",
        "–" if error is None else f"{error:.4f}",
        *([_share(tensor.output_error)] if calibrated else []),
        "–" if zeros is None else f"{zeros:.1%}",
        tensor.outcome + (f": {tensor.reason}" if tensor.reason else ""),
    )


def _share(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"
