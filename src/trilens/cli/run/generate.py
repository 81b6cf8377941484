"""`trilens generate`: the text that a model goes on with, token by token."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from trilens.cli.console import check_file, show_json, status, timed
from trilens.cli.groups import Loading
from trilens.cli.run.prompts import open_lens, prompt_of
from trilens.cli.streams import say, say_piece
from trilens.edits import parse_edit
from trilens.errors import NoTokenizerError
from trilens.io.atomic import write_bytes

__all__ = ["run"]


def run(
    *,
    model: str,
    prompt: str,
    decoder_prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    stop: list[str] | None,
    edit: list[str] | None,
    output: Path | None,
    format: str,
    loading: Loading,
) -> None:
    """Generate, and print as it goes or at the end."""
    check_file(output)
    # Read first: a typing mistake should not cost the time of a load.
    edits = [parse_edit(text) for text in edit or ()]
    with timed(output):
        lens = open_lens(model, loading)
        if lens.tokenizer is None:
            raise NoTokenizerError(f"model {model} has no tokenizer: name one with --tokenizer")
        shown = format == "table" and output is None
        # Text that is shown as it comes says enough.
        with nullcontext() if shown else status("generating"):
            found = lens.generate(
                prompt_of(prompt, chat=chat, decoder_prompt=decoder_prompt),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed or 0,
                stop=stop or (),
                edits=edits,
                stream=(lambda piece, _: say_piece(piece)) if shown else None,
            )
        if shown:
            say("")
        elif format == "json":
            show_json({"model": model, **found.to_dict()}, file=output)
        elif output is not None:
            write_bytes(output, f"{found.text}\n".encode())
