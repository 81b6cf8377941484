"""Edits as data: what is to be changed, where and at which tokens; checked before a run."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
