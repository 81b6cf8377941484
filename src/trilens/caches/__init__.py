"""What a run leaves behind."""

__all__: list[str] = []
