"""`trilens attribute`: what each part of a model adds to a next token's logit."""

from __future__ import annotations

from pathlib import Path

from trilens.analysis.direct_attribution import By, attribute, attribution_sites
from trilens.analysis.tokens import token_id
from trilens.cli.console import check_file, show_result, status, timed
from trilens.cli.groups import Loading
from trilens.cli.pages import model_facts
from trilens.cli.run.prompts import open_lens, prompt_of, typed_token
from trilens.report.text.attribution import print_attribution

__all__ = ["run"]


def run(
    *,
    model: str,
    prompt: str,
    target: str,
    against: str | None,
    by: By,
    top_k: int,
    decoder_prompt: str | None,
    chat: bool,
    output: Path | None,
    format: str,
    loading: Loading,
) -> None:
    """Capture what the attribution needs, and show its parts."""
    check_file(output, format)
    with timed(output):
        lens = open_lens(model, loading)
        first = token_id(lens, typed_token(target))
        second = None if against is None else token_id(lens, typed_token(against))
        with status(f"capturing {model}"):
            sites = attribution_sites(lens, by)
            given = prompt_of(prompt, chat=chat, decoder_prompt=decoder_prompt)
            cap = lens.capture(given, sites=sites, gates=lens.n_streams > 1, logits="last")
            found = attribute(cap, lens, first, second, by=by, k=top_k)
        show_result(
            found,
            print_attribution,
            format=format,
            file=output,
            facts=model_facts(model, loading),
        )
