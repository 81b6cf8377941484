"""All heads in one picture of shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trilens.report.patterns import HeadPatterns

__all__ = ["mosaic"]


def mosaic(patterns: HeadPatterns, side: int) -> tuple[NDArray[np.float32], int]:
    """Every head as a tile, a row per layer, in a picture of about `side` cells.

    Returns:
        Square roots of the weights' shares of the head's largest, with their signs, in [−1, 1],
        NaN between the tiles; and the cells from one tile to the next, the first of which is a gap.
    """
    columns = max(patterns.heads)
    room = side // max(columns, len(patterns.layers))
    step = max(1, -(-patterns.side // max(room - 1, 1)))
    tile = -(-patterns.side // step)
    grid = np.full(
        (len(patterns.layers) * (tile + 1) + 1, columns * (tile + 1) + 1), np.nan, np.float32
    )
    at = 0
    for i, layer in enumerate(patterns.layers):
        for head in range(patterns.heads[i]):
            weights = patterns.weights(layer, head) / (patterns.scales[at] or 1)
            pad = tile * step - patterns.side
            padded = np.pad(weights, (0, pad)).reshape(tile, step, tile, step)
            high, low = padded.max((1, 3)), padded.min((1, 3))
            best = np.where(-low > high, low, high)
            y, x = i * (tile + 1) + 1, head * (tile + 1) + 1
            grid[y : y + tile, x : x + tile] = np.sign(best) * np.sqrt(np.abs(best))
            at += 1
    return grid, tile + 1
