"""Declaration of `trilens ternarize`.

Exit codes: 0 done; 1 the output can't be written; 2 an argument is wrong, or the source can't be
used; 3 more damage than --max-perplexity-ratio allows.
"""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.groups import Coding, Fitting
from trilens.cli.lazy import run

__all__ = ["ternarize"]

_STOPPED = "stopped; run the same command again (a directory goes on from here)"


def ternarize(
    model: o.Model,
    output: o.RequiredOutput,
    to: o.To = "trilens",
    coding: Coding = Coding(),
    ignore: o.Ignore = None,
    only: o.Only = None,
    scale_dtype: o.ScaleDtype = "float32",
    storage: o.Storage = "two_bit",
    rotate: o.Rotate = False,
    plan: o.PlanFile = None,
    calibrate: o.Calibrate = None,
    evaluate: o.Evaluate = None,
    fitting: Fitting = Fitting(),
    field: o.Field = "text",
    revision: o.Revision = None,
    tokenizer: o.TokenizerFiles = None,
    dry_run: o.DryRun = False,
    report: o.Report = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Write a ternary copy of a checkpoint.

    The output is a new directory, or a new .gguf file. Reports each matrix's weight error and, with
    --evaluate, the perplexity before and after. A model that was not trained for ternary weights is
    usually unusable afterwards. With --calibrate: at most 65536 tokens in sequences of 512; a tenth
    of the documents is held out where --evaluate is not given.
    """
    run("ternarize", locals(), stopped=_STOPPED)
