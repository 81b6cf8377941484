"""Declaration of `trilens capture`."""

from __future__ import annotations

from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["capture"]


def capture(
    model: o.Model,
    prompt: o.RequiredPrompt,
    output: o.RequiredOutput,
    residual: o.Residual = "last",
    attention: Annotated[
        bool, typer.Option("--attention", help="Queries and keys of softmax attention.")
    ] = False,
    gates: Annotated[bool, typer.Option("--gates", help="Every proven gate.")] = False,
    effective: o.Effective = False,
    states: o.States = False,
    layers: o.Layers = None,
    logits: o.Logits = "last",
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Save what one forward pass leaves behind.

    One safetensors file, for trilens inspect and trilens.Capture.load.
    """
    run("capture", locals())
