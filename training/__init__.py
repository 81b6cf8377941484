"""The code that trained the demo models; not part of the package."""
