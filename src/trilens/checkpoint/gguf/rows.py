"""The order of rows that an engine wants of queries, keys and values, where it is not the model's.

Shapes: every function → [rows], which row of the checkpoint each row in the file is
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.checkpoint.gguf.settings import kv_heads

__all__ = ["grouped_qkv", "neighbours", "per_head_qkv"]

Order = NDArray[np.int64]


def neighbours(tensor: str, rows: int, config: Any) -> Order | None:
    """Coordinates of a head by pairs of neighbours, where transformers rotates its two halves."""
    if not any(f".attn_{part}." in tensor for part in "qk"):
        return None
    heads = config.num_attention_heads if ".attn_q." in tensor else kv_heads(config)
    # A head's rows are (half, place): the engine wants (place, half).
    numbers = np.arange(rows, dtype=np.int64).reshape(heads, 2, rows // heads // 2)
    return numbers.swapaxes(1, 2).reshape(rows)


def per_head_qkv(tensor: str, rows: int, config: Any) -> Order | None:
    """All queries, keys, values, where each head has its own three side by side."""
    if ".attn_qkv." not in tensor:
        return None
    numbers = np.arange(rows, dtype=np.int64).reshape(config.num_attention_heads, 3, -1)
    return numbers.swapaxes(0, 1).reshape(rows)


def grouped_qkv(tensor: str, rows: int, config: Any) -> Order | None:
    """The same where some queries share a key and a value, which follow them."""
    if ".attn_qkv." not in tensor:
        return None
    heads = config.num_attention_heads
    groups = 1 if config.multi_query and not config.new_decoder_architecture else heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
    if groups == heads and not config.new_decoder_architecture:
        return per_head_qkv(tensor, rows, config)
    numbers = np.arange(rows, dtype=np.int64).reshape(groups, heads // groups + 2, -1)
    parts = (numbers[:, :-2], numbers[:, -2], numbers[:, -1])
    return np.concatenate([part.reshape(-1) for part in parts])
