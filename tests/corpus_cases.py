"""A tiny checkpoint, a corpus of token ids, and stores of it."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from tinymodels import build
from trilens import Lens, Store, StoreOptions, capture_corpus

__all__ = ["contents", "id_documents", "tiny_checkpoint", "tiny_lens", "tiny_store"]


@cache
def tiny_lens(model_type: str = "llama", seed: int = 0) -> Lens:
    return Lens(build(model_type, seed=seed))


def id_documents(count: int = 12, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Documents of token ids, of every length."""
    drawn = random.Random(seed)
    return [
        [drawn.randrange(10, 90) for _ in range(drawn.randint(1, longest))] for _ in range(count)
    ]


def tiny_checkpoint(folder: Path) -> str:
    """The tiny Llama on disk, without a tokenizer."""
    build("llama").save_pretrained(folder)
    return str(folder)


def tiny_store(
    folder: Path, documents: Any = None, *, lens: Lens | None = None, **options: Any
) -> Store:
    """A store of the tiny Llama; `options` are those of `StoreOptions`."""
    chosen = StoreOptions(**{"context": 16, "shard_tokens": 64, "layers": (0, 1), **options})
    corpus = id_documents() if documents is None else documents
    return capture_corpus(lens or tiny_lens(), corpus, folder, options=chosen)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
