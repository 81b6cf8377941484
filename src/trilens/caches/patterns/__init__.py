"""Attention patterns that can be asked: softmax, recurrent and per-channel."""

__all__: list[str] = []
