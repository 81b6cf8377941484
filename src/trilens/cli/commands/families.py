"""Declaration of `trilens families`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.lazy import run

__all__ = ["families"]


def families(
    type: o.TypeName = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """List the model families that work.

    Every causal-LM type of transformers, as last swept.
    """
    run("families", locals())
