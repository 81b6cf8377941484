"""The rules that look at what a matrix gets as input."""

__all__: list[str] = []
