"""Declaration of `trilens capture`.

Exit codes: 0 done; 1 the output can't be written, or a shard not be captured; 2 an argument or a
file is wrong.
"""

from __future__ import annotations

from typing import Annotated

import typer

from trilens.cli import options as o
from trilens.cli.groups import Loading, Storing
from trilens.cli.lazy import run

__all__ = ["capture"]

_STOPPED = "stopped; of a corpus, run the same command again: it goes on from here"


def capture(
    model: o.Model,
    output: o.RequiredOutput,
    prompt: o.Prompt = None,
    data: o.Corpus = None,
    sites: o.Sites = None,
    decoder_prompt: o.DecoderPrompt = None,
    chat: o.Chat = False,
    residual: o.Residual = "last",
    attention: Annotated[
        bool, typer.Option("--attention", help="Queries and keys of softmax attention.")
    ] = False,
    gates: Annotated[bool, typer.Option("--gates", help="Every proven gate.")] = False,
    effective: o.Effective = False,
    states: o.States = False,
    layers: o.Layers = None,
    logits: o.Logits = "last",
    edit: o.Edits = None,
    storing: Storing = Storing(),
    loading: Loading = Loading(),
    debug: o.Debug = False,
) -> None:
    """Save what a prompt, or a whole corpus, leaves behind.

    With --prompt one safetensors file, for trilens inspect and trilens.Capture.load.

    With --data a folder: a store of the values of --sites for every token, and of what --reduce
    makes of them, for trilens.open_store. Here --data also takes chats (JSONL with messages), a
    folder of datasets.save_to_disk, and - for standard input. A run that is stopped goes on when
    the same command is run again.
    """
    run("capture", locals(), stopped=_STOPPED)
