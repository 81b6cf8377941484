"""From token ids to one readable string per token.

How a token reads is asked of the tokenizer itself (what does it decode this id to?), not looked up
by its class: a piece is taken for byte-level text only when decoding agrees, and "▁" for a space
only when decoding removes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BYTE_OF", "Piece", "token_pieces", "token_strings"]

_METASPACE = "▁"
_WORD_END = "</w>"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as they are, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return alphabet


BYTE_OF = _byte_alphabet()
"""The byte behind each character of a byte-level vocabulary."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token id stands for.

    Attributes:
        string: as a person reads it.
        raw: its bytes of text; None for special and unknown tokens, which stand for none.
        is_text: whether the tokenizer keeps it as text, not in an alphabet of bytes or spaces, so
            that what stands between it and its neighbours is the decoder's affair.
    """

    string: str
    raw: bytes | None = None
    is_text: bool = False


def token_strings(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    """One readable string per id.

    Real text wherever the token is text, with the space that belongs to it: byte-level "Ġthe" and
    SentencePiece "▁the" read " the". Bytes that are no whole character read "<0xE2>". WordPiece's
    "##ing" and special tokens stay as they are. Without a tokenizer, and for ids that it does not
    know, the id: "<17>".

    Args:
        ids: token ids.
        tokenizer: the tokenizer, or None.
    """
    pieces = token_pieces(ids, tokenizer)
    return tuple(pieces[token_id].string for token_id in ids)


def token_pieces(ids: Sequence[int], tokenizer: Any) -> Mapping[int, Piece]:
    """What each distinct id stands for; see `token_strings`."""
    if tokenizer is None:
        return {token_id: Piece(f"<{token_id}>") for token_id in ids}
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    # Chat markers are often special without being the first, last or padding token.
    marked = (i for i, token in dict(added).items() if getattr(token, "special", False))
    special = frozenset((*(getattr(tokenizer, "all_special_ids", None) or ()), *marked))
    return {i: _piece_of(i, tokenizer, special=special, added=frozenset(added)) for i in set(ids)}


def _piece_of(
    token_id: int, tokenizer: Any, *, special: frozenset[int], added: frozenset[int]
) -> Piece:
    try:
        piece = tokenizer.convert_ids_to_tokens([token_id])[0]
    except (IndexError, KeyError, ValueError, OverflowError):
        piece = None
    if piece is None:
        return Piece(f"<{token_id}>")
    if isinstance(piece, bytes):
        return Piece(_show_bytes(piece), piece)
    piece = str(piece)
    if token_id in special:
        return Piece(piece)
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte is not None:
        raw = bytes([int(byte.group(1), 16)])
        return Piece(_show_bytes(raw), raw)
    decoded = str(
        tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    # Added tokens are stored as text, never in the byte alphabet.
    if token_id not in added and all(char in BYTE_OF for char in piece):
        raw = bytes(BYTE_OF[char] for char in piece)
        if _agrees(raw, decoded):
            return Piece(_show_bytes(raw), raw, is_text=piece == decoded)
    is_text = piece == decoded
    if _METASPACE in piece and _METASPACE not in decoded:
        piece = piece.replace(_METASPACE, " ")
    if piece.endswith(_WORD_END) and _WORD_END not in decoded:
        piece = piece.removesuffix(_WORD_END) + " "
    return Piece(piece, piece.encode("utf-8", errors="replace"), is_text)


def _agrees(raw: bytes, decoded: str) -> bool:
    """Did the tokenizer decode a piece as these bytes?"""
    try:
        return raw.decode("utf-8") == decoded
    except UnicodeDecodeError:
        # Decoders mark a broken character or drop it.
        return "\ufffd" in decoded or decoded == raw.decode("utf-8", errors="ignore")


def _show_bytes(raw: bytes) -> str:
    """UTF-8 text, with every byte that is no part of a whole character as "<0xE2>"."""
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(
        f"<0x{ord(char) - 0xDC00:02X}>" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text
    )
