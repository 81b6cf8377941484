"""Cuts in the weights' dtype decide as cuts in float64 do; ternary units are recognized."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trilens.ternary.rules.kernels import kernels_for
from trilens.ternary.rules.unit_scan import UnitScan, inner_cuts

CUTS = st.floats(allow_nan=False) | st.floats(-4, 4)


@settings(max_examples=300, deadline=None)
@given(CUTS, CUTS)
@example(0.0, 3.402823364973241e38)
@example(-3.402823364973241e38, -3.402823364973241e38)
@example(3.402823364973241e38, 3.402823364973241e38)
def test_every_float32_falls_on_the_same_side(one: float, other: float) -> None:
    low, high = sorted((one, other))
    rounded = inner_cuts(np.array([[low, high]]), np.dtype(np.float32))
    assert rounded.dtype == np.float32
    for cut in (low, high):
        with np.errstate(over="ignore", under="ignore"):
            nearest = np.float64(cut).astype(np.float32)
            beside = [np.nextafter(nearest, np.float32(end)) for end in (-np.inf, np.inf)]
        for w in (nearest, *beside):
            if np.isfinite(w):
                assert (w < rounded[0, 0]) == (float(w) < low)
                assert (w > rounded[0, 1]) == (float(w) > high)


def test_float64_cuts_stay() -> None:
    cuts = np.array([[-0.1, 0.1], [1 / 3, 2 / 3]])
    assert np.array_equal(inner_cuts(cuts, np.dtype(np.float64)), cuts)


@pytest.mark.parametrize("n_pieces", [1, 2, 3])
@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ([0.0] * 60, 0.0),
        ([0.0] * 40 + [0.5] * 20, 0.5),
        ([0.5, -0.5, 0.0] * 20, 0.5),
        ([0.5] * 40 + [0.25] * 20, -1.0),
        ([0.25] * 40 + [0.5] * 20, -1.0),
        ([0.0] * 59 + [np.nan], -1.0),
        ([0.5] * 59 + [np.inf], -1.0),
        ([np.inf] * 60, -1.0),
    ],
)
def test_ternary_magnitudes(unit: list[float], expected: float, n_pieces: int) -> None:
    pieces = np.array_split(np.array(unit, dtype=np.float32), n_pieces)
    scan = UnitScan(1, 60, n_pieces, lambda i: pieces[i][None], kernels_for(60))
    assert scan.ternary_magnitudes().tolist() == [expected]


def test_several_units_at_once() -> None:
    x = np.array([[0.5, 0.0, -0.5], [0.5, 0.0, 0.4], [0.0, 0.0, 0.0]], dtype=np.float32)
    scan = UnitScan(3, 3, 1, lambda _: x, kernels_for(9))
    assert scan.ternary_magnitudes().tolist() == [0.5, -1.0, 0.0]
    counts, sums = scan.survivors(np.array([0.45, 0.4, 0.0]))
    # 0.4 in float32 is above 0.4 in float64
    assert counts.tolist() == [2, 2, 0]
    assert sums.tolist() == pytest.approx([1.0, 0.9, 0.0])
