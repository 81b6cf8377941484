"""Two models on the same tokens: what differs in output and internals."""

__all__: list[str] = []
