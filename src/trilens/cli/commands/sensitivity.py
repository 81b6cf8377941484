"""Declaration of `trilens sensitivity`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.groups import Coding, Loading, Sampling
from trilens.cli.lazy import run

__all__ = ["sensitivity"]


def sensitivity(
    model: o.Model,
    data: o.Data,
    coding: Coding = Coding(),
    each_matrix: o.EachMatrix = False,
    predict: o.Predict = True,
    sampling: Sampling = Sampling(),
    loading: Loading = Loading(dtype="float32"),
    output: o.Output = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Measure which layers and matrices ternary weights damage.

    Each block alone, blocks 0 … i together and each kind of matrix alone are ternarized in memory
    and restored. Nothing is written, but the result with -o; -o sensitivity.html writes a page.
    """
    run("sensitivity", locals())
