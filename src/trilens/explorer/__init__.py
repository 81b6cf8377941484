"""A model in the browser: a prompt, its report, edits, and what the text becomes."""

__all__: list[str] = []
