"""The rules that need no data: from weights to trits and scales."""

__all__: list[str] = []
