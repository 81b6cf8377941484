"""A small Llama with random weights, of whatever size a test needs."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

__all__ = ["llama_config"]


def llama_config(
    width: int, mlp: int, layers: int, heads: int, vocab: int, **options: Any
) -> LlamaConfig:
    """As many key-value heads as heads, unless the options say otherwise."""
    return LlamaConfig(
        **{
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": vocab,
            **options,
        }
    )
