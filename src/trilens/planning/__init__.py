"""Which matrix becomes what under a budget of bits: sensitivity, candidates, plans."""

__all__: list[str] = []
