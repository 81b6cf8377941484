"""Declaration of `trilens generate`."""

from __future__ import annotations

from trilens.cli import generation_options as go
from trilens.cli import options as o
from trilens.cli.groups import Loading
from trilens.cli.lazy import run

__all__ = ["generate"]


def generate(
    model: o.Model,
    prompt: o.RequiredPrompt,
    decoder_prompt: o.DecoderPrompt = None,
    chat: o.Chat = False,
    max_new_tokens: go.MaxNewTokens = 40,
    temperature: go.Temperature = 0.0,
    top_p: go.TopP = None,
    seed: o.Seed = 0,
    stop: go.Stop = None,
    edit: o.Edits = None,
    output: o.Output = None,
    format: o.Format = "table",
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Go on from a prompt: the text, as it is written.

    As JSON: the text, its tokens and what ended it.
    """
    run("generate", locals())
