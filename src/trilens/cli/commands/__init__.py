"""The commands: parse, call, print."""

__all__: list[str] = []
