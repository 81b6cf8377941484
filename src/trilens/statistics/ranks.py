"""Rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trilens.errors import ShapeError

__all__ = ["rank_correlation"]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing their mean rank.

    Returns:
        In [−1, 1]; None below three pairs, or where one side is all equal.

    Raises:
        ShapeError: sequences of unlike length.
    """
    if len(a) != len(b):
        raise ShapeError(f"sequences of {len(a)} and {len(b)} values cannot be paired")
    if len(a) < 3:
        return None
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    x, y = (values - values.mean() for values in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2
    return means[inverse]
