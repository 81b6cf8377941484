"""Results as tables and charts, however they are shown."""

__all__: list[str] = []
