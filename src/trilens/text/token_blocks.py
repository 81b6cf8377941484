"""A few blocks of tokens from many documents, and documents set aside."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trilens.errors import TextError
from trilens.text.documents import token_blocks

__all__ = ["sample_blocks", "set_aside"]


def sample_blocks(
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[str],
    *,
    length: int,
    tokens: int,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Blocks from the beginnings of documents in random order, an equal share of each.

    Shapes: each block int64 [seq], 2 ≤ seq ≤ length

    Args:
        tokenizer: the model's own.
        documents: texts.
        length: most tokens of a block.
        tokens: most tokens of all blocks.
        seed: of the order.

    Raises:
        NoTokenizerError: the model came without a tokenizer.
        ValueRangeError: a length or number of tokens below 2.
        TextError: no document gives a block.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    share = max(length, tokens // max(1, len(order)))
    found: list[Tensor] = []
    left = tokens
    for document in order:
        if found and left < 2:
            break
        try:
            blocks = token_blocks(
                tokenizer, [document], length=length, limit_tokens=min(share, left)
            )
        except TextError:
            continue  # too short for a block
        found += blocks
        left -= sum(block.numel() for block in blocks)
    if not found:
        raise TextError("no document gives a block of 2 tokens: give longer texts")
    return tuple(found)


def set_aside(documents: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two halves: every other document to work with, and the others to judge by.

    A single document is cut at the line nearest to its middle.

    Raises:
        TextError: a single document of one line.
    """
    if len(documents) > 1:
        return tuple(documents[::2]), tuple(documents[1::2])
    lines = documents[0].splitlines(keepends=True) if documents else []
    half = len(lines) // 2
    if half == 0:
        raise TextError(
            "the text is one document of one line: give several, so that some can be held out"
        )
    return ("".join(lines[:half]),), ("".join(lines[half:]),)
