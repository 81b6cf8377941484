"""What is known about architectures."""

__all__: list[str] = []
