"""`trilens patch`: a patching sweep of two prompts, exact or estimated by gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from trilens.analysis.attribution_patching import attribution_patch
from trilens.analysis.metrics import logit_diff
from trilens.analysis.patching import patch_sweep
from trilens.analysis.tokens import token_id
from trilens.axes import site_name
from trilens.cli.console import check_file, show_result, shown_progress, status, timed
from trilens.cli.groups import Loading
from trilens.cli.interrupts import INTERRUPTED
from trilens.cli.pages import model_facts
from trilens.cli.run.prompts import answered, chosen_layers, open_lens, typed_token
from trilens.cli.streams import say
from trilens.errors import UsageError
from trilens.report.text.patching import print_patch

__all__ = ["run"]

_HEAD = {"format": "trilens.patch", "version": 1}


def run(
    *,
    model: str,
    clean: str,
    corrupted: str,
    target: str,
    against: str,
    decoder_prompt: str | None,
    site: str,
    by: Literal["position", "head"],
    direction: Literal["denoise", "noise"],
    attribution: bool,
    layers: str | None,
    batch_size: int,
    loading: Loading,
    output: Path | None,
    format: str,
) -> None:
    """Sweep and print."""
    check_file(output, format)
    site_name(site)  # A wrong name should not cost the time of a load.
    with timed(output):
        lens = open_lens(model, loading)
        tokens = token_id(lens, typed_token(target)), token_id(lens, typed_token(against))
        if tokens[0] == tokens[1]:
            raise UsageError(f"--target and --against are both token {tokens[0]}: name two")
        metric = logit_diff(*tokens)
        chosen = chosen_layers(layers, lens.n_layers)
        one, other = (answered(text, decoder_prompt) for text in (clean, corrupted))
        if attribution:
            with status("computing gradients"):
                found = attribution_patch(
                    lens, one,
                    other, metric,
                    site=site, layers=chosen, by=by, direction=direction,
                )  # fmt: skip
        else:
            with shown_progress() as progress:
                found = patch_sweep(
                    lens, one,
                    other, metric,
                    site=site, layers=chosen, by=by, direction=direction, batch_size=batch_size,
                    progress=progress,
                )  # fmt: skip
        show_result(
            found,
            print_patch,
            format=format,
            head={**_HEAD, "model": model},
            file=output,
            facts=model_facts(model, loading),
        )
    if not found.complete:
        say("trilens: interrupted: points that were not run have no value", err=True)
        raise typer.Exit(INTERRUPTED)
