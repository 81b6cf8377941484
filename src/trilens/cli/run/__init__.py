"""What the commands do: one module each, imported when the command runs."""

__all__: list[str] = []
