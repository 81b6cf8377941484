"""Tokenizers of other libraries, with the few methods that are asked of transformers' own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trilens.errors import PromptError, UsageError
from trilens.io.messages import clip, reason

__all__ = ["PlainTokenizer", "usable_tokenizer"]

_PROBE = "a"


class PlainTokenizer:
    """A tokenizer that can encode and decode and no more, such as that of the package rwkv.

    It adds no special tokens, and its ids read as what it decodes them to.

    Args:
        tokenizer: `encode(text)` gives token ids, or an object with `ids`; `decode(ids)` text.

    Raises:
        UsageError: it does not.
    """

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            text = tokenizer.decode(self._ids(_PROBE))
        # Someone else's code: whatever it raises, it is no tokenizer that can be used here.
        except Exception as cause:
            raise UsageError(_refusal(tokenizer, reason(cause))) from cause
        if not isinstance(text, str):
            raise UsageError(_refusal(tokenizer, f"decode gives a {type(text).__name__}"))

    def __repr__(self) -> str:
        return f"PlainTokenizer({type(self.tokenizer).__name__})"

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        """Encode a text; the options of transformers' tokenizers mean nothing here.

        Raises:
            PromptError: the tokenizer fails on this text.
        """
        try:
            return {"input_ids": self._ids(text)}
        except Exception as cause:
            raise PromptError(
                f"prompt can't be encoded by {type(self.tokenizer).__name__}: {reason(cause)}"
            ) from cause

    def decode(self, ids: Sequence[int], **_options: Any) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(ids)))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | bytes | None]:
        """The text or bytes of each id; None for one that the tokenizer does not know."""
        return [self._piece(token_id) for token_id in ids]

    def _piece(self, token_id: int) -> str | bytes | None:
        try:
            # The names that the packages rwkv and tiktoken have for it.
            if hasattr(self.tokenizer, "decodeBytes"):
                return bytes(self.tokenizer.decodeBytes([token_id]))
            if hasattr(self.tokenizer, "decode_single_token_bytes"):
                return bytes(self.tokenizer.decode_single_token_bytes(token_id))
            return str(self.tokenizer.decode([token_id]))
        except (LookupError, ValueError, TypeError, ArithmeticError, AssertionError, RuntimeError):
            return None

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer.encode(text)
        return [operator.index(i) for i in getattr(found, "ids", found)]


def usable_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer with the methods of transformers' own, made of what the caller has.

    Args:
        tokenizer: of transformers (as it is), a processor (its tokenizer), a
            `tokenizers.Tokenizer`, any object with `encode` and `decode`, or None.

    Raises:
        UsageError: it is none of these; says what is missing.
    """
    if tokenizer is None or isinstance(tokenizer, PlainTokenizer):
        return tokenizer
    if isinstance(tokenizer, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if isinstance(tokenizer, type) or not hasattr(tokenizer, "decode"):
        raise UsageError(_refusal(tokenizer, "it can't decode"))
    if callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer
    inner = getattr(tokenizer, "tokenizer", None)
    if callable(inner) and hasattr(inner, "convert_ids_to_tokens"):
        return inner
    if not hasattr(tokenizer, "encode"):
        raise UsageError(_refusal(tokenizer, "it can't encode"))
    return PlainTokenizer(tokenizer)


def _refusal(tokenizer: Any, why: str) -> str:
    name = tokenizer.__name__ if isinstance(tokenizer, type) else type(tokenizer).__name__
    kind = "class" if isinstance(tokenizer, type) else "object"
    source = clip(tokenizer) if isinstance(tokenizer, str) else "…"
    return (
        f"tokenizer is no tokenizer but the {kind} {name} ({why}): give one of transformers, such "
        f"as AutoTokenizer.from_pretrained({source}), a tokenizers.Tokenizer, or an object whose "
        "encode(text) gives ids and decode(ids) text"
    )
