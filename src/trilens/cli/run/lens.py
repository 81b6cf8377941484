"""`trilens lens`: what each layer would predict after a prompt."""

from __future__ import annotations

from pathlib import Path

from trilens.analysis.lenses.logit_lens import logit_lens
from trilens.analysis.tokens import token_id
from trilens.cli.console import check_file, show_result, status, timed
from trilens.cli.groups import Loading
from trilens.cli.pages import is_page, model_facts
from trilens.cli.run.prompts import chosen_layers, open_lens, prompt_of, typed_token
from trilens.report.making import LENS_TOKENS
from trilens.report.text.logit_lens import print_logit_lens

__all__ = ["run"]


def run(
    *,
    model: str,
    prompt: str,
    decoder_prompt: str | None,
    chat: bool,
    target: str | None,
    layers: str | None,
    top_k: int,
    output: Path | None,
    format: str,
    loading: Loading,
) -> None:
    """Capture the last token's residual stream and print the lens, or write it to a file."""
    check_file(output, format)
    with timed(output):
        lens = open_lens(model, loading)
        chosen = chosen_layers(layers, lens.n_layers)
        # Read first: a wrong target should not cost the time of a pass.
        number = None if target is None else token_id(lens, typed_token(target))
        # The last layer is what the others are compared with.
        captured = None if chosen is None else sorted({*chosen, lens.n_layers - 1})
        with status(f"capturing {model}"):
            cap = lens.capture(
                prompt_of(prompt, chat=chat, decoder_prompt=decoder_prompt),
                layers=captured,
                logits=None,
                # A page has room for every token.
                residual="all" if is_page(output) else "last",
            )
            seq = len(cap.tokens)
            last = range(max(0, seq - LENS_TOKENS), seq) if is_page(output) else None
            found = logit_lens(cap, lens, k=top_k, target=number, layers=chosen, positions=last)
        show_result(
            found,
            print_logit_lens,
            format=format,
            head={"model": model, "prompt_tokens": cap.tokens},
            file=output,
            facts=model_facts(model, loading),
        )
