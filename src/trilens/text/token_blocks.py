"""How text becomes token blocks: split, sampled, set aside for evaluation, batched by length.

A block never spans two documents, so no token is predicted from a text that is not its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trilens.errors import NoTokenizerError, TextError, ValueRangeError
from trilens.io.messages import reason

__all__ = ["batches_by_length", "sample_blocks", "set_aside", "split_tokens", "token_blocks"]


def split_tokens(ids: Tensor, length: int, *, overlap: int = 0) -> list[Tensor]:
    """Cut the token ids of one document into blocks; a rest of one token predicts nothing.

    Shapes: ids [tokens]; each block [seq], 2 ≤ seq ≤ length

    Args:
        ids: of the document.
        length: maximum tokens of a block.
        overlap: tokens that a block shares with the one before: with 1, every token of the
            document but its first is predicted once.
    """
    starts = range(0, len(ids) - 1, length - overlap)
    blocks = [ids[start : start + length] for start in starts]
    return [block for block in blocks if len(block) > max(1, overlap)]


def token_blocks(
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Sequence[str],
    *,
    length: int,
    limit_tokens: int | None = None,
) -> tuple[Tensor, ...]:
    """Cut documents into blocks of token ids.

    Every document is encoded as the tokenizer encodes a prompt, special tokens included. Blocks of
    a document do not overlap; the rest at its end is a shorter block, dropped where it has fewer
    than two tokens and so predicts nothing.

    Shapes
        each block int64 [seq], 2 ≤ seq ≤ length.

    Args:
        tokenizer: the model's own.
        documents: texts.
        length: maximum tokens of a block.
        limit_tokens: stop once the blocks hold this many tokens; the last block is cut to fit.

    Raises:
        NoTokenizerError: the model came without a tokenizer.
        ValueRangeError: a length or limit below 2.
        TextError: no document gives a block.
    """
    if tokenizer is None:
        raise NoTokenizerError("text needs a tokenizer, and this model came without one")
    if length < 2:
        raise ValueRangeError(
            f"block length is {length}: at least 2 tokens, so that one is predicted"
        )
    if limit_tokens is not None and limit_tokens < 2:
        raise ValueRangeError(
            f"token limit is {limit_tokens}: at least 2, so that one is predicted"
        )
    blocks: list[Tensor] = []
    left = limit_tokens
    for document in documents:
        # verbose=False: a document longer than the model's context is the rule here, not a mishap.
        try:
            ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)
        except Exception as cause:
            raise TextError(
                f"this tokenizer ({type(tokenizer).__name__}) fails on a document: {reason(cause)}"
            ) from cause
        for block in split_tokens(ids, length):
            piece = block if left is None else block[:left]
            if len(piece) < 2:
                continue
            blocks.append(piece)
            left = None if left is None else left - len(piece)
        if left is not None and left < 2:
            break
    if not blocks:
        raise TextError(
            f"{len(documents)} documents give no block of 2 tokens or more: give longer text"
        )
    return tuple(blocks)


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
        length: maximum tokens of a block.
        tokens: maximum tokens of all blocks.
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
    """Two halves: every other document to work with, and the others as held-out text.

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


def batches_by_length(
    blocks: Iterable[Tensor], *, batch_size: int | None = None, max_tokens: int | None = None
) -> Iterator[Tensor]:
    """Neighbouring blocks of one length as one batch: no padding is ever needed.

    Shapes: each block [seq]; each batch [batch, seq]

    Args:
        blocks: read once, as far as the batches are.
        batch_size: maximum blocks of a batch; no bound where not given.
        max_tokens: maximum tokens of a batch, or one block; no bound where not given.

    Raises:
        ValueRangeError: a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueRangeError(f"batch_size is {batch_size}: it must be at least 1")
    batch: list[Tensor] = []
    for block in blocks:
        n_tokens = (len(batch) + 1) * len(block)
        full = len(batch) == batch_size or (max_tokens is not None and n_tokens > max_tokens)
        if batch and (full or len(block) != len(batch[0])):
            yield torch.stack(batch)
            batch = []
        batch.append(block)
    if batch:
        yield torch.stack(batch)
