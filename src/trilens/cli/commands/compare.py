"""The command `compare`.

Exit codes: 0 done; 1 a model gives NaN or the output can't be written; 2 an argument is wrong, or
a model or the data can't be used; 3 a condition of --fail-if is met.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from trilens.analysis.comparison.conditions import Condition, parse_condition
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.rows import Row
from trilens.analysis.comparison.run import CompareOptions, compare
from trilens.cli.console import DebugOption, FormatOption, console, one_line_errors
from trilens.cli.text_option import documents_of
from trilens.errors import NonFiniteError, UsageError
from trilens.lens.lens import Lens
from trilens.report.text.comparison import print_comparison
from trilens.text.token_blocks import token_blocks

__all__ = ["register"]

_MET = 3


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command("compare")(_compare)


def _compare(
    before: Annotated[
        str, typer.Argument(help="The reference: directory or hub id.", metavar="BEFORE")
    ],
    after: Annotated[
        str,
        typer.Argument(help="What became of it: ternary, fine-tuned …", metavar="AFTER"),
    ],
    data: Annotated[
        str,
        typer.Option("--data", help="Text: .txt, .jsonl, .parquet, a folder, stdlib or demo."),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for JSON, Parquet and arrays.")
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            help="Exit with 3 where it holds: 'kl_nats_mean>0.1', 'perplexity.ratio>1.05'; "
            "repeatable.",
        ),
    ] = None,
    lens: Annotated[
        Literal["last", "all", "none"],
        typer.Option("--lens", help="Logit lens of each block's last token, of all, or none."),
    ] = "last",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Most tokens to read. [default: all]", min=2)
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens in a block.", min=2)] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Blocks in one forward pass.", min=1)
    ] = 4,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of both models: auto, float32, bfloat16 …")
    ] = "auto",
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="As in transformers: cpu, cuda, auto.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that ships with a checkpoint.")
    ] = False,
    output: FormatOption = "table",
    debug: DebugOption = False,
) -> None:
    """Compare a model with what became of it.

    What it says, and inside, layer by layer: residual stream, attention, heads, gates, logit lens,
    weights.
    """
    met: list[tuple[Condition, list[Row]]] = []
    with one_line_errors(debug, failures=(NonFiniteError,)):
        conditions = [parse_condition(text) for text in fail_if or ()]
        if out is not None and out.exists() and not out.is_dir():
            raise UsageError(f"--output {out} is a file: name a folder")
        documents = documents_of(data)
        left, right = (
            Lens.from_pretrained(
                name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
            )
            for name in (before, after)
        )
        tokenizer = left.tokenizer or right.tokenizer
        blocks = token_blocks(tokenizer, documents, length=length, limit_tokens=limit)
        options = CompareOptions(lens=lens, batch_size=batch_size)
        found = compare(left, right, blocks, options=options)
        if out is not None:
            found.save(out)
        _print(found, output)
        met = [(each, each.met_by(found.rows)) for each in conditions]
    for condition, rows in met:
        if rows:
            typer.echo(f"trilens: {_words(condition, rows)}", err=True)
    if any(rows for _, rows in met):
        raise typer.Exit(_MET)


def _print(found: Comparison, output: str) -> None:
    if output == "json":
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
    else:
        print_comparison(found, console(pipe_width=140))


def _words(condition: Condition, rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: abs(condition.value(row)))
    place = "" if worst.layer is None else f" of layer {worst.layer}"
    place += "" if worst.head is None else f", head {worst.head}"
    module = "" if worst.module == "output" else f" ({worst.module})"
    return (
        f"{condition.text} holds in {len(rows)} row{'s' if len(rows) > 1 else ''}: "
        f"{condition.metric}{place}{module} is {condition.value(worst):g}"
    )
