"""Products with packed matrices on a GPU."""

__all__: list[str] = []
