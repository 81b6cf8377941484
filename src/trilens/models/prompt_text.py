"""From a prompt's tokens to its text and the characters that each of them covers.

As with `token_strings`, the tokenizer itself is asked. Where the pieces of the tokens spell the
text that was given, byte for byte, they are the answer. Where they do not, since the tokenizer
changed the text first (case, accents, spaces), its own offsets are. A prompt of ids has its pieces
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trilens.models.token_strings import Piece, token_pieces
from trilens.text.prompt_text import PromptText

__all__ = ["spelled"]

_CONTINUES = "##"
_BROKEN = "\ufffd"


def spelled(
    ids: Sequence[int], tokenizer: Any, written: str | None, add_special_tokens: bool
) -> tuple[tuple[str, ...], PromptText | None]:
    """One readable string per token, and the prompt's text; None without a tokenizer.

    Args:
        ids: the prompt's tokens.
        tokenizer: the tokenizer, or None.
        written: the text that they were made of, where it is known.
        add_special_tokens: whether the tokenizer put its special tokens around it.
    """
    known = token_pieces(ids, tokenizer)
    strings = tuple(known[token_id].string for token_id in ids)
    if tokenizer is None:
        return strings, None
    pieces = [known[token_id] for token_id in ids]
    if written is not None:
        raws = [piece.raw for piece in pieces]
        for candidate in (raws, _without_first_space(raws)):
            if _spells(candidate, strings, written):
                return strings, PromptText.from_pieces(candidate)
        by_offsets = _by_offsets(ids, tokenizer, written, add_special_tokens, known)
        if by_offsets is not None:
            return strings, by_offsets
    return strings, _of_ids(ids, tokenizer, pieces)


def _spells(raws: Sequence[bytes | None], strings: Sequence[str], written: str) -> bool:
    """Whether the pieces give the text; special tokens may be written in it or not."""
    whole, at = written.encode("utf-8"), 0
    for raw, string in zip(raws, strings, strict=True):
        piece = string.encode("utf-8", errors="replace") if raw is None else raw
        if whole.startswith(piece, at):
            at += len(piece)
        elif raw is not None:
            return False
    return at == len(whole)


def _without_first_space(raws: Sequence[bytes | None]) -> list[bytes | None]:
    """SentencePiece writes a space before the first word that was not in the text."""
    first = next((i for i, raw in enumerate(raws) if raw), None)
    found = list(raws)
    if first is not None:
        found[first] = (raws[first] or b"").removeprefix(b" ")
    return found


def _by_offsets(
    ids: Sequence[int],
    tokenizer: Any,
    written: str,
    add_special_tokens: bool,
    known: Mapping[int, Piece],
) -> PromptText | None:
    """The text as it was given, with the tokenizer's own offsets; None where it has none."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(
        written,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    offsets = [(int(start), int(stop)) for start, stop in encoded["offset_mapping"]]
    if list(encoded["input_ids"]) != list(ids):
        return None
    spans, text, taken = list[tuple[int, int]](), list[str](), 0
    removed, at = 0, 0
    for token_id, (start, stop) in zip(ids, offsets, strict=True):
        piece = known[token_id]
        if piece.raw is None and written[start:stop] == piece.string and stop > start:
            # A special token that was written in the text stands for no text.
            text.append(written[taken:start])
            removed, taken = removed + stop - start, stop
            at = stop - removed
            spans.append((at, at))
        elif stop > start:
            # Offsets may leave out the space that a token holds.
            held = piece.string[:1].isspace() and start > taken and written[start - 1].isspace()
            at = stop - removed
            spans.append((start - removed - held, at))
        else:
            spans.append((at, at))
    text.append(written[taken:])
    return PromptText("".join(text), tuple(spans))


def _of_ids(ids: Sequence[int], tokenizer: Any, pieces: Sequence[Piece]) -> PromptText:
    """The text of a prompt of ids: what its pieces spell, as the decoder joins them."""
    if any(piece.raw and _BROKEN in piece.string for piece in pieces):
        return _in_runs(ids, tokenizer, pieces)
    raws: list[bytes | None] = [piece.raw for piece in pieces]
    if _joins_words(ids, tokenizer, pieces):
        seen = False
        for i, piece in enumerate(pieces):
            if piece.raw is not None:
                continues = piece.string.startswith(_CONTINUES)
                word = piece.raw.removeprefix(_CONTINUES.encode())
                raws[i] = word if continues or not seen else b" " + word
                seen = True
        return PromptText.from_pieces(raws)
    first = next((i for i, raw in enumerate(raws) if raw), None)
    if first is not None and pieces[first].string[:1] == " ":
        decoded = tokenizer.decode(
            [ids[first]], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if not str(decoded).startswith(" "):
            raws = _without_first_space(raws)
    return PromptText.from_pieces(raws)


def _joins_words(ids: Sequence[int], tokenizer: Any, pieces: Sequence[Piece]) -> bool:
    """Whether decoding puts a space between tokens: asked of one token, written twice."""
    for token_id, piece in zip(ids, pieces, strict=True):
        if piece.is_text and not piece.string.startswith(_CONTINUES) and piece.string.isalnum():
            twice = tokenizer.decode(
                [token_id] * 2, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            return str(twice) == f"{piece.string} {piece.string}"
    return False


def _in_runs(ids: Sequence[int], tokenizer: Any, pieces: Sequence[Piece]) -> PromptText:
    """Of a tokenizer that shows parts of characters as U+FFFD alone: such a run is decoded as one,
    and each of its tokens covers all of it."""
    text, spans, i = "", list[tuple[int, int]](), 0
    while i < len(ids):
        stop = i + 1
        if _BROKEN in pieces[i].string:
            while stop < len(ids) and _BROKEN in pieces[stop].string:
                stop += 1
            part = str(tokenizer.decode(list(ids[i:stop])))
        else:
            part = (pieces[i].raw or b"").decode("utf-8", errors="replace")
        spans += [(len(text), len(text) + len(part))] * (stop - i)
        text, i = text + part, stop
    return PromptText(text, tuple(spans))
