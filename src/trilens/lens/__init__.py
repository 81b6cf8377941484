"""A model opened: what a caller asks for, the pass, and the capture that it leaves behind."""

__all__: list[str] = []
