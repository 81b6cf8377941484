"""Declaration of `trilens patch`.

Exit codes: 0 done; 1 the model has not the site; 2 an argument is wrong, or a model can't be used;
130 interrupted: what was run until then is printed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["patch"]


def patch(
    model: o.Model,
    clean: Annotated[str, typer.Argument(metavar="CLEAN", help="The clean prompt.")],
    corrupted: Annotated[str, typer.Argument(metavar="CORRUPTED", help="The corrupted prompt.")],
    target: o.RequiredTarget,
    against: o.RequiredAgainst,
    decoder_prompt: o.DecoderPrompt = None,
    site: o.PatchSite = "resid_pre",
    by: o.By = "position",
    direction: o.Direction = "denoise",
    attribution: o.Attribution = False,
    layers: o.Layers = None,
    batch_size: o.BatchSize = 16,
    loading: Loading = Loading(dtype="float32"),
    output: o.Output = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Patch one prompt's values into another's run, point by point.

    Effects are of the logit of --target less that of --against after the last token: 0 is the run
    that is patched, 1 the one whose values are put in. -o patch.html writes a page with a heatmap.
    """
    run("patch", locals())
