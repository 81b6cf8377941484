"""The compiled loops over packed codes on a CPU."""

__all__: list[str] = []
