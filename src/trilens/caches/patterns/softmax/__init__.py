"""Softmax attention, kept as queries and keys."""

__all__: list[str] = []
