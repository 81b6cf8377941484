"""The command line: parse, call, print, exit code."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers import logging as transformers_logging

from trilens.analysis.inspection import Inspection, inspect_capture
from trilens.cli.commands.compare import register as register_compare
from trilens.cli.commands.sensitivity import register as register_sensitivity
from trilens.cli.commands.ternary import register
from trilens.cli.console import DebugOption, FormatOption, console, one_line_errors
from trilens.demo import DEMO_MODELS, demo_path, training_record
from trilens.errors import UnclaimedGateError, UsageError
from trilens.io.json import json_text
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.families import load_families
from trilens.models.rwkv7.convert import convert as convert_rwkv7
from trilens.models.tokens import token_strings
from trilens.report.text.demo import print_side_by_side
from trilens.report.text.families import print_families
from trilens.report.text.inspection import print_inspection
from trilens.version import __version__

__all__ = ["app", "convert", "demo", "families", "inspect", "main"]

DEMO_PROMPT = "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial("

app = typer.Typer(
    name="trilens",
    help="Open a language model: residual stream, attention and gates, one forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trilens {__version__}")
        raise typer.Exit(0)


@app.callback()
def _root(
    _show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Open a language model: residual stream, attention and gates, one forward pass."""


TopK = Annotated[
    int, typer.Option("--top-k", help="Attended tokens per layer, and next tokens.", min=1)
]


def _layers(text: str | None, n_layers: int) -> list[int] | None:
    """`0,2-4` → [0, 2, 3, 4]."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--layers {text!r} is not a list of layers: write for example 0,2-4")
        end = int(last) if dash else int(first)
        if int(first) > end:
            raise UsageError(f"--layers {part.strip()!r} runs backwards: write {end}-{first}")
        if end >= n_layers:
            raise UsageError(
                f"--layers {part.strip()!r} is out of range: this model has layers 0–{n_layers - 1}"
            )
        found += range(int(first), end + 1)
    return found


def _prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _capture(
    lens: Lens, prompt: str, layers: list[int] | None, effective: bool = False
) -> tuple[Capture, list[str]]:
    """Capture what this model has; what it has not is said in a note."""
    anatomy = lens.anatomy
    wanted = range(lens.n_layers) if layers is None else layers
    notes = []
    odd = [layer for layer in wanted if layer in anatomy.other_attention]
    attention = not odd and any(layer in anatomy.attention for layer in wanted)
    if odd:
        notes.append(f"no attention patterns: layer {odd[0]}: {anatomy.other_attention[odd[0]]}")
    elif not attention:
        notes.append("no softmax attention in these layers")
    gated = {layer for layers in lens.gate_layers.values() for layer in layers}
    gates = any(layer in gated for layer in wanted)
    if not gates:
        notes.append("no gates are proven in these layers")
    if lens.unused_weights:
        notes.append(f"{len(lens.unused_weights)} stored tensors have no place in this model")
    if type(lens.model) in MODEL_FOR_MASKED_LM_MAPPING.values():
        notes.append("a masked language model: next is what it would put in the last token's place")
    recurrent = [layer for layer in lens.effective_layers if layer in wanted]
    if effective:
        notes.append(
            "effective attention: signed weights of a recurrence's values, the largest by size; "
            "rows do not sum to 1"
        )
    elif recurrent:
        notes.append("recurrent layers: --effective shows what they attend to")

    def run(gates: bool) -> Capture:
        return lens.capture(
            prompt, attention=attention, gates=gates, effective=effective, layers=layers
        )

    try:
        capture = run(gates)
    except UnclaimedGateError as error:
        notes.append(f"no gates: {error}")
        capture = run(False)
    return capture, notes


def _inspect(
    lens: Lens, name: str, prompt: str, layers: str | None, top_k: int, effective: bool = False
) -> Inspection:
    capture, notes = _capture(lens, prompt, _layers(layers, lens.n_layers), effective)
    return inspect_capture(
        capture,
        name=name,
        top_k=top_k,
        token_text=lambda token: token_strings([token], lens.tokenizer)[0],
        notes=notes,
    )


def _print(inspection: Inspection, how: str) -> None:
    if how == "json":
        typer.echo(json_text(inspection.to_dict()))
    else:
        print_inspection(inspection, console())


@app.command()
def demo(
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Another prompt; - reads standard input.")
    ] = DEMO_PROMPT,
    top_k: TopK = 3,
    output: FormatOption = "table",
    debug: DebugOption = False,
) -> None:
    """Inspect the demo models that ship along, side by side.

    A transformer, a Mamba and an RWKV-7 with one tokenizer, trained on the same text.
    """
    with one_line_errors(debug):
        text = _prompt(prompt)
        shown: dict[str, Inspection] = {}
        for name in DEMO_MODELS:
            lens = Lens.from_pretrained(str(demo_path(name)))
            effective = bool(lens.effective_layers)
            shown[name] = _inspect(lens, f"demo {name}", text, None, top_k, effective)
        if output == "json":
            models = [inspection.to_dict() for inspection in shown.values()]
            typer.echo(json_text(models))
            return
        out = console()
        for inspection in shown.values():
            print_inspection(inspection, out)
            out.print()
        records = {name: training_record(name) for name in shown}
        print_side_by_side(shown, records, out)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.", metavar="MODEL")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Text; - reads standard input.")],
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers, for example 0,2-4. [default: all]")
    ] = None,
    top_k: TopK = 3,
    effective: Annotated[
        bool,
        typer.Option("--effective", help="Effective attention of recurrent layers, with signs."),
    ] = False,
    output: FormatOption = "table",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16, float16, float64.")
    ] = "auto",
    device_map: Annotated[
        str | None, typer.Option("--device-map", help="As in transformers: cpu, cuda, auto.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that ships with the checkpoint.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Show a prompt layer by layer.

    Per layer: norm of the residual stream, what the last token attends to, the gates; and the most
    probable next tokens.
    """
    with one_line_errors(debug):
        lens = Lens.from_pretrained(
            model,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        name = Path(model).name if Path(model).is_dir() else model
        _print(_inspect(lens, name, _prompt(prompt), layers, top_k, effective), output)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="Published RWKV-7 weights: .pth or safetensors.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="New checkpoint directory.")],
    debug: DebugOption = False,
) -> None:
    """Convert published RWKV-7 weights.

    Writes a transformers checkpoint directory.
    """
    with one_line_errors(debug):
        done = convert_rwkv7(source, out)
        layers = done.config["num_hidden_layers"]
        typer.echo(
            f"{done.path}: {layers} layers, {done.n_tensors} tensors, {done.size_bytes} bytes"
        )


@app.command()
def families(
    output: FormatOption = "table",
    debug: DebugOption = False,
) -> None:
    """List the model families that work.

    Every causal-LM type of transformers, as last swept.
    """
    with one_line_errors(debug):
        table = load_families()
        if output == "json":
            typer.echo(json_text(table.to_dict()))
        else:
            print_families(table, console())


register(app)
register_compare(app)
register_sensitivity(app)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the `trilens` command."""
    # transformers warns of every GPU kernel that is not installed: no news in a table.
    transformers_logging.set_verbosity_error()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a token must not end the command.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return app(args=arguments, prog_name="trilens")


if __name__ == "__main__":
    main()
