"""Results in a notebook: a static picture and table, or the report in a frame."""

__all__: list[str] = []
