"""The search in bins, for units too long to be sorted, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilens.ternary.rules.exact import best_survivors
from trilens.ternary.rules.kernels import kernels_for
from trilens.ternary.rules.unit_scan import UnitScan

N = 40_000


def in_pieces(weights: np.ndarray, n_pieces: int) -> UnitScan:
    pieces = np.array_split(weights, n_pieces)
    return UnitScan(
        1, weights.size, n_pieces, lambda i: pieces[i][None], kernels_for(weights.size, "numpy")
    )


def check(weights: np.ndarray, n_pieces: int = 3) -> None:
    scan = in_pieces(weights, n_pieces)
    cut, k, total = (found[0] for found in best_survivors(scan, scan.abs_sums()))
    magnitudes = np.abs(weights.astype(np.float64))
    kept = magnitudes[magnitudes > cut]
    assert kept.size == k
    assert total == pytest.approx(kept.sum(), rel=1e-12)
    ordered = np.sort(magnitudes)[::-1]
    sums = np.cumsum(ordered)
    best = np.max(sums**2 / np.arange(1, sums.size + 1))
    assert total**2 / k == pytest.approx(best, rel=1e-12)


def draw(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    return {
        "gaussian": lambda: rng.standard_normal(N),
        "laplace": lambda: rng.laplace(size=N),
        "uniform": lambda: rng.uniform(-1, 1, N),
        "cauchy": lambda: rng.standard_cauchy(N),
        "one outlier": lambda: np.append(rng.standard_normal(N - 1), 1e6),
        "few outliers": lambda: np.append(rng.standard_normal(N - 20), np.full(20, 3e3)),
        "mostly zero": lambda: rng.standard_normal(N) * (rng.random(N) < 0.01),
        "near constant": lambda: rng.choice([-1, 1], N) * (1 + 1e-4 * rng.random(N)),
        "two magnitudes": lambda: rng.choice([-3.0, -1.0, 1.0, 3.0], N),
        "levels of int4": lambda: rng.integers(-7, 8, N) * 0.125,
        "spread over decades": lambda: 10 ** rng.uniform(-30, 30, N),
    }[kind]()


KINDS = [
    "gaussian",
    "laplace",
    "uniform",
    "cauchy",
    "one outlier",
    "few outliers",
    "mostly zero",
    "near constant",
    "two magnitudes",
    "levels of int4",
    "spread over decades",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distributions(kind: str, dtype: type) -> None:
    check(draw(kind).astype(dtype))


@pytest.mark.parametrize("seed", range(12))
def test_draws(seed: int) -> None:
    # The optimum may be above or below the best edge: one draw alone would not tell.
    rng = np.random.default_rng(seed)
    check(rng.standard_normal(4000).astype(np.float32))
    check(rng.laplace(size=4000))


def test_optimum_among_outliers_that_no_edge_shows() -> None:
    # Keeping all gives S²/k = 42 327 and the three outliers 40 833; the largest alone is better.
    weights = np.full(N, 1.02)
    weights[:3] = 210.0, 70.0, -70.0
    scan = in_pieces(weights, 3)
    _, k, total = best_survivors(scan, scan.abs_sums())
    assert (k[0], total[0]) == (1, 210.0)
    check(weights.astype(np.float32))


@pytest.mark.parametrize("size", [1e-44, 1e-42, 1e-40, 1e-39, 1e-37, 1e30, 3e37])
def test_sizes_at_the_ends_of_float32(size: float) -> None:
    check((draw("gaussian") * size).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 16, width=16, allow_subnormal=False), min_size=8, max_size=200).filter(
        any
    ),
    st.integers(2, 5),
)
def test_any_weights(weights: list[float], n_pieces: int) -> None:
    check(np.array(weights, dtype=np.float32), n_pieces)


def test_only_promising_weights_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_sizes = []
    sort = np.sort

    def counting(array: np.ndarray, *args: object, **kwargs: object) -> np.ndarray:
        sorted_sizes.append(array.size)
        return sort(array, *args, **kwargs)

    weights = draw("gaussian").astype(np.float32)
    scan = in_pieces(weights, 3)
    with monkeypatch.context() as patch:
        patch.setattr(np, "sort", counting)
        best_survivors(scan, scan.abs_sums())
    assert 0 < sum(sorted_sizes) < 0.1 * N
