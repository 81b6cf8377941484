"""The commands `sensitivity` and `plan`.

Exit codes: 0 done; 1 a file can't be written; 2 an argument is wrong, or the model can't be used;
3 no plan within the budget keeps the damage within the bound.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.checkpoint.format.shards import json_bytes, write_whole
from trilens.cli.console import DebugOption, FormatOption, console, one_line_errors
from trilens.cli.text_option import documents_of
from trilens.errors import ConfigError, UsageError, ValueRangeError
from trilens.io.hub import local_folder
from trilens.io.safetensors_header import TensorHeader, read_headers, read_json
from trilens.lens.lens import Lens
from trilens.models.tokens import max_positions_of
from trilens.planning.calibrated_candidates import hessians_of, with_text
from trilens.planning.candidates import data_free
from trilens.planning.matrices import find_matrices
from trilens.planning.planning import Candidates, make_plan
from trilens.planning.result import PlanOptions
from trilens.planning.sensitivity import measure_sensitivity
from trilens.progress import Step
from trilens.report.text.sensitivity import print_plan, print_sensitivity
from trilens.text.token_blocks import sample_blocks, set_aside

__all__ = ["register"]

_HELD_OUT_TIMES = 4  # held-out tokens for each token that costs are measured on

ModelArgument = Annotated[
    str, typer.Argument(help="Checkpoint directory or hub id.", metavar="MODEL")
]
DataOption = Annotated[
    str, typer.Option("--data", help="Text: .txt, .jsonl, .parquet, a folder, stdlib or demo.")
]
FieldOption = Annotated[str, typer.Option("--field", help="Key of the text in JSONL and Parquet.")]
TokensOption = Annotated[int, typer.Option("--tokens", help="Tokens to measure on.")]
LengthOption = Annotated[int, typer.Option("--length", help="Most tokens of a block.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="What to compute in: float32, bfloat16, auto …")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device-map", help="As in transformers: cpu, cuda.")
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to an app."""
    app.command("sensitivity")(_sensitivity)
    app.command("plan")(_plan)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model and the headers of the checkpoint that it was read from."""

    lens: Lens
    headers: dict[str, TensorHeader]


def _sensitivity(
    model: ModelArgument,
    data: DataOption,
    rule: Annotated[str, typer.Option("--rule", help="As in ternarize.")] = "absmean",
    group_size: Annotated[
        int | None, typer.Option("--group-size", help="Weights that share a scale along a row.")
    ] = None,
    per: Annotated[
        str | None, typer.Option("--per", help="One scale per tensor, row or group.")
    ] = None,
    each_matrix: Annotated[
        bool, typer.Option("--each-matrix", help="Measure every matrix alone, too.")
    ] = False,
    predict: Annotated[
        bool, typer.Option("--predict/--no-predict", help="Also guess, and compare the ranks.")
    ] = True,
    tokens: TokensOption = 4096,
    length: LengthOption = 256,
    field: FieldOption = "text",
    dtype: DtypeOption = "float32",
    device_map: DeviceOption = None,
    revision: RevisionOption = None,
    output: FormatOption = "table",
    debug: DebugOption = False,
) -> None:
    """Measure which blocks and matrices break the model.

    Each block alone, blocks 0 … i together and each kind of matrix alone become ternary in memory
    and are put back. Nothing is written.
    """
    with one_line_errors(debug):
        options: dict[str, Any] = {"rule": rule, "per": per, "group_size": group_size}
        entry = MatrixPlan(**options)
        documents = documents_of(data, field=field)
        opened = _open(model, dtype, device_map, revision)
        blocks = _blocks(opened.lens, documents, length, tokens)
        with _bar() as progress:
            found = measure_sensitivity(
                opened.lens,
                blocks,
                rule=entry,
                headers=opened.headers,
                each_matrix=each_matrix,
                predict=predict,
                progress=progress,
            )
        if output == "json":
            _print_json(found.to_dict())
        else:
            print_sensitivity(found, console())


def _plan(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the plan, for ternarize --plan.")
    ] = None,
    budget_bits: Annotated[
        float | None,
        typer.Option("--budget-bits", help="Most bits per weight over the blocks' matrices."),
    ] = None,
    max_damage: Annotated[
        float | None,
        typer.Option("--max-damage", help="Highest ratio of perplexities, 1 or more."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", help="Text to judge by. [default: every other document]"),
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Also offer the calibrated rules, fitted on --data; ternarize --plan then needs "
            "--calibrate.",
        ),
    ] = False,
    costs: Annotated[
        str, typer.Option("--costs", help="measured, or predicted (faster).")
    ] = "measured",
    storage: Annotated[str, typer.Option("--storage", help="compact or two_bit.")] = "compact",
    scale_dtype: Annotated[
        str, typer.Option("--scale-dtype", help="float16, bfloat16 or float32.")
    ] = "float16",
    tokens: TokensOption = 2048,
    length: LengthOption = 256,
    field: FieldOption = "text",
    dtype: DtypeOption = "float32",
    device_map: DeviceOption = None,
    revision: RevisionOption = None,
    output: FormatOption = "table",
    debug: DebugOption = False,
) -> None:
    """Make a plan under a budget of bits or a bound on damage.

    Of every matrix: keep it, or code it by one of all rules and group sizes. The whole plan is
    measured in memory on held-out text.
    """
    with one_line_errors(debug):
        values: dict[str, Any] = {"costs": costs, "storage": storage, "scale_dtype": scale_dtype}
        options = PlanOptions(budget_bits=budget_bits, max_perplexity_ratio=max_damage, **values)
        if out is not None and out.is_dir():
            raise UsageError(f"output {out} is a directory: name a file for the plan")
        documents = documents_of(data, field=field)
        if held_out is None:
            documents, judged = set_aside(documents)
        else:
            judged = documents_of(held_out, field=field)
        opened = _open(model, dtype, device_map, revision)
        blocks = _blocks(opened.lens, documents, length, tokens)
        candidates: Candidates = data_free
        if calibrated:
            matrices = find_matrices(opened.lens, opened.headers)
            candidates = with_text(hessians_of(opened.lens, matrices, blocks))
        with _bar() as progress:
            planned = make_plan(
                opened.lens,
                blocks,
                _blocks(opened.lens, judged, length, _HELD_OUT_TIMES * tokens),
                options=options,
                headers=opened.headers,
                candidates=candidates,
                progress=progress,
            )
        if output == "json":
            _print_json(planned.to_dict())
        else:
            print_plan(planned, console())
        if not planned.holds:
            typer.echo(
                f"trilens: damage is beyond the bound: perplexity × "
                f"{planned.damage.perplexity_ratio:.3f}, at most {max_damage} was asked; "
                "no plan was written; allow more bits or more damage",
                err=True,
            )
            raise typer.Exit(3)
        if out is not None:
            write_whole(out, json_bytes(planned.to_dict()))


def _open(model: str, dtype: str, device_map: str | None, revision: str | None) -> _Opened:
    folder, source = local_folder(model, revision=revision, code=False)
    if read_json(folder / "config.json", ConfigError).get("quantization_config") is not None:
        raise UsageError(f"{source} is quantized already: give the checkpoint with plain weights")
    lens = Lens.from_pretrained(str(folder), dtype=dtype, device_map=device_map)
    return _Opened(lens, read_headers(folder))


def _blocks(lens: Lens, documents: Sequence[str], length: int, tokens: int) -> tuple[Tensor, ...]:
    limit = max_positions_of(lens.model)
    if limit is not None and length > limit:
        raise ValueRangeError(
            f"length {length} is out of range: the model takes at most {limit} tokens"
        )
    return sample_blocks(lens.tokenizer, documents, length=length, tokens=tokens)


@contextmanager
def _bar() -> Iterator[Callable[[Step], None] | None]:
    """A progress bar with the time left, on standard error, where somebody can see it."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)

        def step(now: Step) -> None:
            bar.update(task, completed=now.done, total=now.total, description=now.what[-50:])

        yield step


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(_plain(values), ensure_ascii=False, indent=2))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
