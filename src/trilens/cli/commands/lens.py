"""Declaration of `trilens lens`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["lens"]


def lens(
    model: o.Model,
    prompt: o.RequiredPrompt,
    decoder_prompt: o.DecoderPrompt = None,
    chat: o.Chat = False,
    target: o.Target = None,
    layers: o.Layers = None,
    top_k: o.TopK = 3,
    output: o.Output = None,
    format: o.Format = "table",
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Show what each layer would predict after a prompt.

    The logit lens: the residual stream of the last token after each layer, through the model's own
    final norm and unembedding. -o lens.html writes a page, of every token.
    """
    run("lens", locals())
