"""Declaration of `trilens ternarize`.

Exit codes: 0 done; 1 the output can't be written, or workers are lost; 2 an argument is wrong, or
the source can't be used; 3 more damage than --max-perplexity-ratio allows.
"""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli import store_options as so
from trilens.cli.errors import FILE_FAILURES
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
    embeddings: o.Embeddings = "keep",
    rotate: o.Rotate = False,
    plan: o.PlanFile = None,
    calibrate: o.Calibrations = None,
    evaluate: o.Evaluations = None,
    fitting: Fitting = Fitting(),
    field: o.Field = "text",
    revision: o.Revision = None,
    tokenizer: o.TokenizerFiles = None,
    workers: so.Workers = 1,
    ray: so.Ray = None,
    dry_run: o.DryRun = False,
    report: o.Report = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Write a ternary copy of a checkpoint.

    The output is a new directory, or a new .gguf file. Reports each matrix's weight error and, with
    --evaluate, the perplexity before and after. A model that was not trained for ternary weights is
    usually unusable afterwards. A calibrated rule looks at --calibrate, or at what the model writes
    itself: at most 65536 tokens in sequences of 512 (--effort fast: 16384, max: 524288), a tenth of
    them held out. What it costs is told before it starts.
    """
    run("ternarize", locals(), failures=FILE_FAILURES, stopped=_STOPPED)
