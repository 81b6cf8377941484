"""What a run leaves behind: the residual stream, attention patterns, gates, recurrent states."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
