"""What the files of a ternary checkpoint are called and hold."""

__all__: list[str] = []
