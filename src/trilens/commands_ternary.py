"""The commands `ternarize` and `validate`.

Exit codes: 0 done; 1 `validate` found damage; 2 an argument is wrong, or the source cannot be used;
3 the output cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.plan import TernaryPlan
from trilens.checkpoint.report import TensorReport, TernaryReport
from trilens.checkpoint.validation import validate
from trilens.errors import CorruptFileError, TrilensError, WriteError

__all__ = ["register"]

_Format = Annotated[
    Literal["table", "json"], typer.Option("--format", help="How to print the report.")
]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("ternarize")(_ternarize)
    app.command("validate")(_validate)


def _ternarize(
    source: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="New directory for the output.", metavar="OUT")],
    rule: Annotated[
        str,
        typer.Option("--rule", help="absmean, absmean_refit, twn, exact, asymmetric or planes."),
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
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sizes, read headers only, write nothing.")
    ] = False,
    output: _Format = "table",
    debug: _Debug = False,
) -> None:
    """Write a ternary copy of a checkpoint, and print each matrix's weight error."""
    with _errors(debug, damaged=2):
        options: dict[str, Any] = {"rule": rule, "per": per, "scale_dtype": scale_dtype}
        plan = TernaryPlan(
            **options, group_size=group_size, keep=tuple(keep or ()), only=tuple(only or ())
        )
        report = ternarize(source, out, plan=plan, dry_run=dry_run, revision=revision)
        _print(report, output)


def _validate(
    path: Annotated[Path, typer.Argument(help="Directory that ternarize wrote.", metavar="OUT")],
    output: _Format = "table",
    debug: _Debug = False,
) -> None:
    """Read a ternary checkpoint back, every byte, and check what it claims."""
    with _errors(debug, damaged=1):
        report = validate(path)
        if output == "json":
            typer.echo(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
            return
        typer.echo(
            f"{path}: undamaged. {len(report.coded)} matrices hold legal codes and finite scales; "
            "all files have the size and hash that the manifest lists."
        )
        typer.echo(report.verdict)


def _print(report: TernaryReport, output: str) -> None:
    if output == "json":
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("matrix", overflow="fold")
    for name in ("shape", "bits/weight", "relative error", "zeros"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    for tensor in report.matrices:
        table.add_row(*_cells(tensor))
    # A pipe has no width: wide enough for one row per matrix.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
    kept = len(report.tensors) - len(report.coded)
    typer.echo(
        f"{len(report.coded)} matrices coded, {kept} tensors kept ({len(report.fallbacks)} of them "
        f"matrices); {report.size_bytes_before:,} → {report.size_bytes:,} bytes, "
        f"{report.bits_per_weight:.2f} bits per weight over all tensors."
    )
    typer.echo(report.verdict)


def _cells(tensor: TensorReport) -> tuple[str, ...]:
    error, zeros = tensor.relative_error, tensor.sparsity
    return (
        tensor.name,
        "×".join(map(str, tensor.shape)),
        f"{tensor.bits_per_weight:.3f}",
        "–" if error is None else f"{error:.4f}",
        "–" if zeros is None else f"{zeros:.1%}",
        tensor.outcome + (f": {tensor.reason}" if tensor.reason else ""),
    )


@contextlib.contextmanager
def _errors(debug: bool, *, damaged: int) -> Iterator[None]:
    """One line on stderr and an exit code instead of a traceback."""
    try:
        yield
    except TrilensError as error:
        if debug:
            raise
        typer.echo(f"trilens: {' '.join(str(error).split())}", err=True)
        code = 3 if isinstance(error, WriteError) else 2
        raise typer.Exit(damaged if isinstance(error, CorruptFileError) else code) from None
    except KeyboardInterrupt:
        typer.echo("trilens: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
