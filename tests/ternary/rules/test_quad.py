"""Four levels {−1, 0, 1, 2}·d: the optimum by brute force, the long way, and what becomes of it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import sum_error
from trilens.errors import UsageError, ValueRangeError
from trilens.ternary.calibrated.hessian import Hessian, Moments
from trilens.ternary.calibrated.rules import calibrate
from trilens.ternary.packed.linear import TernaryLinear
from trilens.ternary.packed.multiply import multiply
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules import quad as rule
from trilens.ternary.rules.kernels import kernels_for
from trilens.ternary.rules.unit_scan import UnitScan

LEVELS = (-1, 0, 1, 2)
QUARTERS = st.lists(st.integers(-12, 12), min_size=1, max_size=6).map(
    lambda ws: [w / 4 for w in ws]
)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def least_error(weights: list[float]) -> float:
    """Of all ways to give levels, each with the best d. Quarters and their sums are exact."""
    exact = np.array(weights, dtype=np.float64)
    ways = np.array(list(itertools.product(LEVELS, repeat=len(weights))), dtype=np.float64)
    explained = (ways @ exact) ** 2 / np.maximum(np.sum(ways * ways, axis=1), 1)
    return float(np.sum(exact * exact) - explained.max())


@settings(max_examples=100, deadline=None)
@given(QUARTERS)
def test_no_other_levels_are_better(weights: list[float]) -> None:
    quant = PerLayerQuant.quantize(weights, "w", rule="quad")
    error = sum(
        (Fraction(w) - Fraction(float(quant.scale)) * n) ** 2
        for w, n in zip(weights, quant.trits.tolist(), strict=True)
    )
    # The only rounding is that of d = A/B to float64.
    assert float(error) == pytest.approx(least_error(weights), rel=1e-9, abs=1e-12)


def test_random_groups_reach_the_optimum() -> None:
    weights = draw(30, 7, seed=1)
    quant = PerLayerQuant.quantize(weights, "w", rule="quad", per="row")
    assert quant.levels == 4
    assert quant.trits.max() == 2
    assert (quant.scales < 0).any()
    assert (quant.scales > 0).any()
    for row, found in zip(weights, quant.reconstruct().numpy(), strict=True):
        error = float(np.sum((row.astype(float) - found) ** 2))
        assert error == pytest.approx(least_error(row.tolist()), rel=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "skewed", "uniform"])
@pytest.mark.parametrize("seed", range(2))
def test_a_long_unit_is_as_good_as_a_short_one(kind: str, seed: int) -> None:
    """Alternating minimisation on units read in pieces, against the optimum."""
    rng = np.random.default_rng(seed)
    weights = {
        "gaussian": rng.standard_normal,
        "laplace": lambda n: rng.laplace(size=n),
        "skewed": lambda n: rng.exponential(size=n) - 0.4,
        "uniform": lambda n: rng.uniform(-1, 1, n),
    }[kind](30_000).astype(np.float32)
    pieces = np.array_split(weights, 3)
    scan = UnitScan(1, weights.size, 3, lambda i: pieces[i][None], kernels_for(0, "numpy"))
    whole = UnitScan(1, weights.size, 1, lambda _: weights[None], kernels_for(0, "numpy"))
    sums = scan.abs_sums()
    found = rule.search_four_levels(scan, sums / weights.size, sums).scales[0, 0]
    best = rule.fit_four_levels(whole).scales[0, 0]

    def error(d: float) -> float:
        away = [(weights - np.float32(d) * n) ** 2 for n in LEVELS]
        return float(np.min(away, axis=0).sum(dtype=np.float64))

    assert error(found) <= error(best) * (1 + 1e-3)


def test_better_than_trits_on_the_same_groups() -> None:
    weights = draw(64, 512)
    four, three = (
        PerLayerQuant.quantize(weights, "w", rule=name, group_size=128)
        for name in ("quad", "exact")
    )
    # Gaussian, groups of 128: .132 and .187.
    assert four.relative_error(weights) == pytest.approx(0.132, abs=0.004)
    assert three.relative_error(weights) == pytest.approx(0.187, abs=0.004)


@pytest.mark.parametrize("scale_dtype", [None, "float16", "bfloat16", "float32"])
def test_what_has_four_levels_keeps_them(scale_dtype: str | None) -> None:
    options = {"rule": "quad", "group_size": 32, "scale_dtype": scale_dtype}
    first = PerLayerQuant.quantize(draw(8, 96), "w", **options)  # type: ignore[arg-type]
    again = PerLayerQuant.quantize(first.reconstruct(), "w", **options)  # type: ignore[arg-type]
    assert torch.equal(first.reconstruct(), again.reconstruct())


def test_ternary_units_are_kept() -> None:
    trits = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (4, 64)).astype(np.float32))
    quant = PerLayerQuant.quantize(0.25 * trits, "w", rule="quad", group_size=32)
    assert quant.was_ternary
    assert torch.equal(quant.trits, trits.to(torch.int8))


def test_lost_scales_are_counted() -> None:
    weights = draw(2, 32)
    weights[1] *= 1e-12
    quant = PerLayerQuant.quantize(weights, "w", rule="quad", per="row", scale_dtype="float16")
    assert quant.zeroed_units == 1
    assert not quant.reconstruct()[1].any()


def test_two_is_no_trit_elsewhere() -> None:
    two = torch.tensor([[2, -1]], dtype=torch.int8)
    with pytest.raises(ValueRangeError, match="from -1 to 2: they are −1, 0 or 1"):
        PerLayerQuant.from_trits(two, 1.0, "w")
    assert PerLayerQuant.from_trits(two, -1.0, "w", levels=4).reconstruct().tolist() == [[-2, 1]]
    with pytest.raises(ValueRangeError, match="−1, 0, 1 or 2"):
        PerLayerQuant.from_trits(two + 1, 1.0, "w", levels=4)


@pytest.mark.parametrize("inputs", [1, 4, 40])
@pytest.mark.parametrize("group_size", [128, None])
def test_packed_products(inputs: int, group_size: int | None) -> None:
    """Also where compiled loops look codes up: 2¹⁸ weights and more."""
    quant = PerLayerQuant.quantize(draw(512, 640), "w", rule="quad", group_size=group_size)
    layer = TernaryLinear.from_quant(quant)
    layer.check("w")
    x = torch.from_numpy(draw(inputs, 640, seed=3))
    dense = quant.reconstruct()
    assert torch.equal(layer.reconstruct(), dense)
    exact = x.double() @ dense.double().T
    terms = x.abs().double() @ dense.abs().double().T
    found = multiply(x, layer.packed).double()
    assert np.all((found - exact).abs().numpy() <= sum_error(640, terms, torch.float32))


@pytest.mark.parametrize("name", ["gptq_quad", "best_quad"])
def test_calibrated(name: str) -> None:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((48, 48)) * np.exp(rng.standard_normal(48))
    x = rng.standard_normal((400, 48)) @ mix
    weights = draw(24, 48)
    moments = Moments.of(weights, Hessian(x.T @ x, 400))
    plain = PerLayerQuant.quantize(weights, "w", rule="quad", group_size=16)
    start = moments.output_error(plain.reconstruct().double().numpy())
    found = calibrate(weights, "w", moments, rule=name, group_size=16, scale_dtype="float16")
    assert found.quant.levels == 4
    assert found.quant.trits.max() == 2
    assert (found.quant.scales < 0).any()
    assert found.output_error < (0.7 if name == "gptq_quad" else 0.5) * start
    three = calibrate(weights, "w", moments, rule=name.removesuffix("_quad"), group_size=16)
    assert found.output_error < three.output_error


def test_an_unknown_rule_names_it() -> None:
    with pytest.raises(UsageError, match="planes, quad"):
        PerLayerQuant.quantize([1.0], "w", rule="octo")  # type: ignore[arg-type]
