"""Questions about captures and models: what a prompt did, how two models differ."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
