"""Results as text."""

__all__: list[str] = []
