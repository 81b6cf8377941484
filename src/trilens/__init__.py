"""trilens opens a language model: the residual stream, the attention, the gates."""

__all__ = ["__version__"]

__version__ = "0.1.0"
