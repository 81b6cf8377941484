"""Declaration of `trilens demo`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.lazy import run

__all__ = ["demo"]


def demo(
    prompt: o.Prompt = None,
    top_k: o.TopK = 3,
    report: o.Report = None,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Inspect the included demo models, side by side.

    A transformer, a Mamba and an RWKV-7 with one tokenizer, trained on the same text.
    """
    run("demo", locals())
