"""Declaration of `trilens convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.errors import FILE_FAILURES
from trilens.cli.lazy import run

__all__ = ["convert"]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Published RWKV-7 weights: .pth or safetensors.")
    ],
    output: o.RequiredOutput,
    tokenizer: o.TokenizerFiles = None,
    debug: o.Debug = False,
) -> None:
    """Convert published RWKV-7 weights.

    Writes a transformers checkpoint directory.
    """
    run("convert", locals(), failures=FILE_FAILURES)
