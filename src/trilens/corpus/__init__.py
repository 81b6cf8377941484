"""Whole corpora: stores of activations, reducers, and the shard function that fills them."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
