"""How a few inputs in bfloat16 lie as whole numbers of two or three bytes (limbs).

`native_limbs.h` writes them there: one input for products in registers (`native_one.c`), several
for those in tiles (`native_limbs.c`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["TILE_INPUTS", "WIDE", "Limbs", "find_limbs"]

TILE_INPUTS, WIDE = 16, 256  # columns of a tile; of 64 bytes of codes
_TILES = 2  # of inputs
_KEPT = 1 << 12


class Limbs(NamedTuple):
    """What begins where in one piece of memory, in bytes; the limbs themselves at 0.

    Shapes: one input: x int8 [steps, limbs, 4, 64], sums int32 [steps, limbs, 16]; several: x
    [tiles, steps, 4, 16, columns, 4], sums [tiles, steps, columns]; places 128 bytes for each step
    of 256 columns, or span of steps; factors float32 [inputs]

    Attributes:
        parts: several: groups that 256 columns belong to, at most.
        span_steps: several: steps whose sums are scaled at once.
        places: where scales stand.
        sums: of the limbs, negative.
        factors: what the sums are to be multiplied by, a power of two for each input.
        size: of all.
    """

    parts: int
    span_steps: int
    places: int
    sums: int
    factors: int
    size: int


@lru_cache(_KEPT)
def find_limbs(
    n_inputs: int, cols: int, group_size: int | None, one_group: bool, limbs: int
) -> Limbs | None:
    """Where they lie; None for more inputs than two tiles hold.

    Args:
        n_inputs: 1 or more.
        cols: of the matrix.
        group_size: of its scales.
        one_group: whether a row has one scale.
        limbs: bytes of an input.
    """
    steps = -(-cols // WIDE)
    if n_inputs == 1:
        places, sums = steps * limbs * WIDE, steps * (limbs * WIDE + 128)
        factors = sums + steps * limbs * 64
        return Limbs(1, 1, places, sums, factors, factors + 4)
    parts = _most_parts(cols, group_size)
    each = min(TILE_INPUTS // (limbs * parts), n_inputs)  # inputs of a tile
    if n_inputs > _TILES * each:
        return None
    columns = limbs * parts * each
    tiles = -(-n_inputs // each)
    places = steps * tiles * columns * WIDE
    sums = places + 128 * steps
    factors = sums + 4 * steps * tiles * columns
    span_steps = steps if one_group else TILE_INPUTS // columns
    return Limbs(parts, span_steps, places, sums, factors, factors + 4 * n_inputs)


def _most_parts(cols: int, group_size: int | None) -> int:
    """Groups that 256 columns belong to, at most."""
    size = cols if group_size is None else group_size
    starts = range(0, cols, WIDE)
    return max((min(at + WIDE, cols) - 1) // size - at // size + 1 for at in starts)
