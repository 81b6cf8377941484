"""Two models on the same tokens: what differs in what they say, and inside."""

__all__: list[str] = []
