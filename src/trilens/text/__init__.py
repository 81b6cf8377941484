"""Text to measure on: documents from files, and the token blocks that a model reads."""

__all__: list[str] = []
