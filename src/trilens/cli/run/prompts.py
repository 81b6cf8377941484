"""What commands on one prompt share: the model, the prompt, the layers."""

from __future__ import annotations

import sys
from dataclasses import asdict

from trilens.cli.console import status
from trilens.cli.groups import Loading
from trilens.errors import UsageError
from trilens.io.messages import reason
from trilens.lens.lens import Lens
from trilens.models.tokenizer_files import read_tokenizer
from trilens.models.tokens import PromptLike, SourceTarget

__all__ = ["answered", "chosen_layers", "open_lens", "prompt_of", "prompt_text", "typed_token"]


def open_lens(model: str, loading: Loading | None = None) -> Lens:
    """Load a model, with a line on the terminal while it loads."""
    options = asdict(loading or Loading())
    tokenizer = options.pop("tokenizer")
    with status(f"loading {model}"):
        # Read first: a wrong path should not cost the time of a load.
        found = None if tokenizer is None else read_tokenizer(tokenizer)
        lens = Lens.from_pretrained(model, **options)
        if found is not None:
            lens.tokenizer = found
        return lens


def prompt_text(prompt: str) -> str:
    """The prompt, or standard input for ``-``.

    Raises:
        UsageError: standard input is closed or can't be read.
    """
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read()
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"standard input cannot be read ({reason(error)}): pipe UTF-8 text into it, or give "
            "the prompt with -p TEXT"
        ) from error


def prompt_of(prompt: str, *, chat: bool, decoder_prompt: str | None = None) -> PromptLike:
    """The prompt as text, as the one message of a chat, or as the source of a decoder's text.

    Raises:
        UsageError: a chat and a decoder's text, which no model reads together.
    """
    if chat and decoder_prompt is not None:
        raise UsageError("--chat and --decoder-prompt exclude each other: leave one out")
    text = prompt_text(prompt)
    return [{"role": "user", "content": text}] if chat else answered(text, decoder_prompt)


def answered(text: str, decoder_prompt: str | None) -> PromptLike:
    """A text, or the source of what a decoder reads."""
    return text if decoder_prompt is None else SourceTarget(text, decoder_prompt)


def chosen_layers(text: str | None, n_layers: int | None) -> list[int] | None:
    """`0,2-4` → [0, 2, 3, 4]; None for all.

    Args:
        text: the option.
        n_layers: of the model; None where it is not loaded yet.

    Raises:
        UsageError: not a list of layers, or one that the model does not have.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--layers {text!r} is not a list of layers: write for example 0,2-4")
        end = int(last) if dash else int(first)
        if int(first) > end:
            raise UsageError(f"--layers {part.strip()!r} runs backwards: write {end}-{first}")
        if n_layers is not None and end >= n_layers:
            raise UsageError(
                f"--layers {part.strip()!r} is out of range: this model has layers 0–{n_layers - 1}"
            )
        found += range(int(first), end + 1)
    return found


def typed_token(text: str) -> int | str:
    """A token as it is typed: ``#42`` is an id, everything else a token's text."""
    return int(text[1:]) if text[:1] == "#" and text[1:].isdecimal() else text
