"""Declaration of `trilens inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Checkpoint directory, hub id, or file of trilens capture."
        ),
    ],
    prompt: o.Prompt = None,
    decoder_prompt: o.DecoderPrompt = None,
    chat: o.Chat = False,
    layers: o.Layers = None,
    top_k: o.TopK = 3,
    effective: o.Effective = False,
    states: o.States = False,
    edit: o.Edits = None,
    output: o.Output = None,
    format: o.Format = "table",
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Show a prompt layer by layer.

    Per layer: norm of the residual stream, what the last token attends to, the gates; and the most
    probable next tokens. A file of trilens capture needs no prompt. -o report.html writes a page
    with charts: every head's pattern, the logit lens, every gate.
    """
    run("inspect", locals())
