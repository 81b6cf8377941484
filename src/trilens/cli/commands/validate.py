"""Declaration of `trilens validate`.

Exit codes: 0 undamaged; 1 damaged; 2 there is nothing to validate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.errors import FILE_FAILURES
from trilens.cli.lazy import run
from trilens.errors import CorruptFileError

__all__ = ["validate"]


def validate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="What trilens wrote: a checkpoint, GGUF file, capture, store, comparison or plan.",
        ),
    ],
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Check every byte of a file or folder that trilens wrote."""
    run("validate", locals(), failures=(*FILE_FAILURES, CorruptFileError))
