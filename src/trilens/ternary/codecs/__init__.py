"""Exact codecs for trits: what is encoded decodes to the same bits."""

__all__: list[str] = []
