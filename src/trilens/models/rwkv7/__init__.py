"""RWKV-7 "Goose" as a transformers model, and the conversion of published weights."""

__all__: list[str] = []
