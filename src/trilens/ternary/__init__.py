"""Weights to trits {−1, 0, +1} and back: rules, exact codecs and the hot loops."""

from trilens.ternary.quantize import PerLayerQuant

__all__ = ["PerLayerQuant"]
