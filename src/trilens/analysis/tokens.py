"""One token of a model's vocabulary, as a caller names it: by its id or by its text."""

from __future__ import annotations

from trilens.errors import TokenIdError, UsageError
from trilens.io.messages import clip, listed
from trilens.lens.lens import Lens
from trilens.models.token_strings import token_strings
from trilens.models.tokens import read_prompt, vocab_size_of
from trilens.numbers import whole_number

__all__ = ["Token", "token_id"]

Token = int | str
"""A token's id, or the text of one token with the space that belongs to it."""

_LEAD = "a"  # SentencePiece writes a space of its own before a text, but not within one


def token_id(lens: Lens, token: Token) -> int:
    """The id of a token among the logits of a model.

    Raises:
        TokenIdError: no id that the model has.
        NoTokenizerError: text, and no tokenizer.
        UsageError: text of several tokens, or of none; names them.
    """
    found = _read(lens, token) if isinstance(token, str) else whole_number(token, "token id")
    vocab = lens.anatomy.vocab or vocab_size_of(lens.model)
    if not 0 <= found < vocab:
        raise TokenIdError(f"token id {found} is out of range: this model has ids 0–{vocab - 1}")
    return found


def _read(lens: Lens, text: str) -> int:
    ids = _ids(lens, text)
    if len(ids) == 1:
        return ids[0]
    lead = _ids(lens, _LEAD)
    inside = _ids(lens, _LEAD + text)
    own = inside[len(lead) :]
    apart = inside[: len(lead)] == lead and len(own) == 1
    if apart and token_strings(own, lens.tokenizer) == (text,):
        return own[0]
    pieces = listed([repr(each) for each in token_strings(ids, lens.tokenizer)], 6)
    raise UsageError(
        f"target {clip(text)} is {len(ids)} tokens ({pieces}): give the text of one token, with "
        "the space before it if it has one, or a token id"
    )


def _ids(lens: Lens, text: str) -> list[int]:
    read = read_prompt(
        text,
        tokenizer=lens.tokenizer,
        vocab_size=vocab_size_of(lens.model),
        max_positions=None,
        add_special_tokens=False,
    )
    found: list[int] = read.ids.tolist()
    return found
