"""Token streams and the batches cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from trilens.demo.corpus import Document
from trilens.text.token_blocks import split_tokens

__all__ = ["encode_documents", "heldout_windows", "pack", "training_batches"]


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[torch.Tensor]:
    """Encode each document as int64 ids ``[tokens + 1]``, opened by the bos/eos token."""
    encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    return [torch.tensor([tokenizer.bos_token_id, *ids], dtype=torch.int64) for ids in encoded]


def pack(documents: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Join documents in a shuffled order into one stream ``[tokens]``."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    return torch.cat([documents[index] for index in order])


def training_batches(
    documents: Sequence[torch.Tensor], batch: int, length: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(inputs, labels)``, each int64 ``[batch, length]``, for ever.

    Every epoch shuffles the documents, cuts the stream at a fresh offset and shuffles the cuts,
    so no two epochs show the same windows; everything comes from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        stream = pack(documents, generator)
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - 1 - offset) // length
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - batch + 1, batch):
            starts = offset + order[first : first + batch] * length
            index = starts[:, None] + torch.arange(length + 1)
            window = stream[index]
            yield window[:, :-1], window[:, 1:]


def heldout_windows(documents: Sequence[torch.Tensor], length: int) -> list[torch.Tensor]:
    """Cut each document by itself; every token but the bos is predicted exactly once.

    Returns:
        Windows int64 ``[tokens]`` of at most ``length + 1`` tokens: ``length`` inputs, and their
        labels one further on.
    """
    return [
        window for document in documents for window in split_tokens(document, length + 1, overlap=1)
    ]
