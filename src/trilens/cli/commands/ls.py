"""Declaration of `trilens ls`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.errors import FILE_FAILURES
from trilens.cli.lazy import run

__all__ = ["ls"]


def ls(
    path: Annotated[
        Path, typer.Argument(metavar="STORE", help="Folder that trilens capture --data wrote.")
    ],
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """List what a store of activations holds."""
    run("ls", locals(), failures=FILE_FAILURES)
