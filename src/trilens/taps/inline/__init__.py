"""Attention that a model computes in its own code, beside transformers' registry."""

__all__: list[str] = []
