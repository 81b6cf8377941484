"""Declaration of `trilens attribute`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["attribute"]


def attribute(
    model: o.Model,
    prompt: o.RequiredPrompt,
    target: o.RequiredTarget,
    against: o.Against = None,
    by: o.Parts = "component",
    top_k: o.TopK = 5,
    decoder_prompt: o.DecoderPrompt = None,
    chat: o.Chat = False,
    output: o.Output = None,
    format: o.Format = "table",
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Show what each part of the model adds to a next token's logit.

    Direct logit attribution: the parts sum to the model's own logit, or to the difference of two.
    -o attribution.html writes a page with charts.
    """
    run("attribute", locals())
