"""Weights to trits {−1, 0, +1} and back.

`quantize` has the result, `rules` what makes it, `codecs` the exact encodings, `packed` the layer
that computes with them.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
