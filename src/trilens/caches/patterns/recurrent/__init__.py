"""The effective attention of layers with a matrix state."""

__all__: list[str] = []
