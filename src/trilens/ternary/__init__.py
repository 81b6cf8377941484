"""Weights to trits {−1, 0, +1} and back.

`quantize` has the result, `rules` what makes it, `packing`, `blocks` and `sparse` the exact codecs;
the rest is how it is done: `source` reads weights in blocks, `units` says what shares a scale,
`scan`, `exact` and `alternating` look at units, `engine` puts it together over `kernels`.
"""

from trilens.ternary.codecs.gguf_blocks import CODECS, find_codec
from trilens.ternary.codecs.packing import Codec, Unpacked
from trilens.ternary.codecs.sparse import decode_csr, encode_csr, encode_smallest
from trilens.ternary.granularity import Units
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.fused import PackedQuant, pack_absmean
from trilens.ternary.rules.rules import RULES

__all__ = [
    "CODECS",
    "RULES",
    "Codec",
    "PackedQuant",
    "PerLayerQuant",
    "Units",
    "Unpacked",
    "decode_csr",
    "encode_csr",
    "encode_smallest",
    "find_codec",
    "pack_absmean",
]
