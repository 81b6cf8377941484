"""The effective attention of diagonal recurrences, per channel."""

__all__: list[str] = []
