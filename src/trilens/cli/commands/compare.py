"""Declaration of `trilens compare`.

Exit codes: 0 done; 1 a model gives NaN or the output can't be written; 2 an argument is wrong, or
a model or the data can't be used; 3 a condition of --fail-if is met.
"""

from __future__ import annotations

from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.lazy import run

__all__ = ["compare"]


def compare(
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help="The reference: directory or hub id.")
    ],
    after: Annotated[
        list[str],
        typer.Argument(
            metavar="AFTER",
            help="The derived model: ternary, fine-tuned …; several: a training run.",
        ),
    ],
    data: o.Data,
    output: o.Output = None,
    fail_if: o.FailIf = None,
    lens: o.LogitLens = "last",
    max_tokens: o.MaxTokens = None,
    seq_length: o.SampleLength = 256,
    batch_size: o.BatchSize = 4,
    seed: o.Seed = 0,
    field: o.Field = "text",
    dtype: o.Dtype = "auto",
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    attn_implementation: o.AttnImplementation = None,
    tokenizer: o.TokenizerFiles = None,
    report: o.Report = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Compare a model with one derived from it.

    Output, and layer by layer: residual stream, attention, heads, gates, recurrent states, logit
    lens, weights. Several derived models, such as the checkpoints of a training run, are each
    compared with the first. Writes a folder: JSON, Parquet, safetensors; or a
    page with charts: -o compare.html.
    """
    run("compare", locals())
