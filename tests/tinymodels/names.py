"""Short names for the layer kinds that the override tables spell out."""

from __future__ import annotations

FULL = "full_attention"
SLIDE = "sliding_attention"
LINEAR = "linear_attention"
INDEXED = "indexed_attention"
CONV = "conv"
HYBRID = "hybrid"
HYBRID_SLIDE = "hybrid_sliding"
DENSE = "dense"
SPARSE = "sparse"
