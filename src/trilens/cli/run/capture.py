"""`trilens capture`: one forward pass, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from trilens.cli.console import check_file, status, timed
from trilens.cli.groups import Loading
from trilens.cli.run.prompts import chosen_layers, open_lens, prompt_of
from trilens.cli.streams import say

__all__ = ["run"]

Which = Literal["last", "all", "none"]


def run(
    *,
    model: str,
    prompt: str,
    chat: bool,
    output: Path,
    residual: Which,
    attention: bool,
    gates: bool,
    effective: bool,
    states: bool,
    layers: str | None,
    logits: Which,
    loading: Loading,
) -> None:
    """Capture and save."""
    check_file(output)
    with timed(output):
        lens = open_lens(model, loading)
        with status("capturing"):
            capture = lens.capture(
                prompt_of(prompt, chat=chat),
                residual=None if residual == "none" else residual,
                attention=attention,
                gates=gates,
                effective=effective,
                layers=chosen_layers(layers, lens.n_layers),
                logits=None if logits == "none" else logits,
                states=states,
            )
        capture.save(output)
        say(repr(capture))
