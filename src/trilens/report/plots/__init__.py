"""Pictures for a paper: matplotlib figures of what the report draws."""

__all__: list[str] = []
