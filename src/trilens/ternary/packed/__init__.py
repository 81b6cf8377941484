"""Products with packed matrices."""

__all__: list[str] = []
