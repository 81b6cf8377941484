"""Pure functions from captures to results."""

__all__: list[str] = []
