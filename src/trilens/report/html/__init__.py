"""A page as one HTML file that asks nothing of any network."""

__all__: list[str] = []
