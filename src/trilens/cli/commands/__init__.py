"""Declarations of the commands: one file each, light to import."""

__all__: list[str] = []
