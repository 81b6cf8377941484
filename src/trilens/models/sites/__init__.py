"""Named places of the forward pass: found by rule, proven on a probe."""

__all__: list[str] = []
