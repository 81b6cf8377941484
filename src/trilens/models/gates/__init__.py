"""Where gates are, one file per kind of gate."""

__all__: list[str] = []
