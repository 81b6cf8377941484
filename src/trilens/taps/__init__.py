"""Everything that touches a running model: hooks, attention registry, mode. Always undone."""

__all__: list[str] = []
