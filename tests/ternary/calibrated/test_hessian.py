"""The moments of inputs and outputs: what they say is what the sums over tokens say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tolerances import assert_close_sums, assert_near, sum_error
from trilens.errors import NonFiniteError, ShapeError, UsageError
from trilens.ternary.calibrated.hessian import Hessian, Moments, MomentSums, upper_factor


def text(tokens: int = 400, cols: int = 24, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((cols, cols)) * np.exp(generator.standard_normal(cols))
    return generator.standard_normal((tokens, cols)) @ mix


def summed(x: np.ndarray, y: np.ndarray, parts: int = 3) -> Moments:
    sums = MomentSums("x", x.shape[1], {"w": y.shape[1]})
    for one, other in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        sums.add(torch.from_numpy(one), {"w": torch.from_numpy(other)})
    return sums.result()["w"]


def expansion_error(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """What Σ‖Ŵx‖² − 2ΣŴx·y + Σ‖y‖², over Σ‖y‖², may be off by: its terms are added one by one."""
    terms = np.sum((np.abs(x) @ np.abs(weights).T + np.abs(y)) ** 2) / np.sum(y**2)
    return float(sum_error(len(x) + weights.size * x.shape[1], terms))


def test_output_error_is_that_of_the_tokens() -> None:
    generator = np.random.default_rng(1)
    x, other = text(), text(seed=2)
    dense = generator.standard_normal((10, 24))
    y = other @ dense.T
    coded = dense + 0.3 * generator.standard_normal(dense.shape)
    wanted = np.sum((x @ coded.T - y) ** 2) / np.sum(y**2)
    error = expansion_error(x, y, coded)
    assert error < 1e-8 * wanted
    assert summed(x, y).output_error(coded) == pytest.approx(wanted, abs=error)
    assert summed(x, y).hessian.n_tokens == 400


def test_float32_inputs_give_the_sums_of_float64_within_their_rounding() -> None:
    """More tokens than are summed at once, more channels than a panel; and an overflow of one."""
    x = torch.from_numpy(text(tokens=2500, cols=300)).float()
    y = x[:, :5].clone()
    sums = MomentSums("x", 300, {"w": 5})
    sums.add(x, {"w": y})
    found = sums.result()["w"]
    wide = x.double().numpy()
    scale = np.sqrt(np.sum(wide**2, axis=0))
    terms = np.outer(scale, scale)
    matrix, cross = found.hessian.matrix.numpy(), found.cross.numpy()
    assert np.array_equal(matrix, matrix.T)
    assert np.all(np.abs(matrix - wide.T @ wide) <= 1e-5 * terms)
    assert np.all(np.abs(cross - wide[:, :5].T @ wide) <= 1e-5 * terms[:5])
    assert found.energy == pytest.approx(np.sum(wide[:, :5] ** 2), rel=1e-5)
    large = MomentSums("x", 300, {})
    large.add(1e25 * x[:10], {})
    assert bool(torch.isfinite(large.hessian().matrix).all())


def test_no_weights_are_better_than_the_best_ones() -> None:
    """The target is the least-squares solution, up to its ridge."""
    x = text(tokens=4000)
    dense = np.random.default_rng(1).standard_normal((10, 24))
    bent = np.eye(24) + 0.2 * np.random.default_rng(2).standard_normal((24, 24))
    y = x @ bent @ dense.T
    moments = summed(x, y)
    solution = np.linalg.lstsq(x, y, rcond=None)[0].T
    best = moments.output_error(moments.best_weights(dense))
    assert moments.output_error(solution) <= best + expansion_error(x, y, solution)
    assert best < 0.5 * moments.output_error(dense)


def test_equal_inputs_leave_the_weights_alone() -> None:
    dense = np.random.default_rng(1).standard_normal((10, 24))
    x = text()
    moments = summed(x, x @ dense.T)
    # What is solved for is C − W·H, 0 but for its rounding; the ridge, 1 % of H's mean diagonal,
    # is the least that this is divided by.
    terms = np.linalg.norm(np.abs(dense) @ (np.abs(x).T @ np.abs(x)), axis=1).max()
    step = 2 * terms / (0.01 * moments.hessian.mean_diagonal)
    assert_close_sums(moments.best_weights(dense), dense, step, len(x) + 24)
    moments = Moments.of(dense, moments.hessian)
    assert_close_sums(moments.best_weights(dense), dense, step, len(x) + 24)
    found = moments.output_error(dense)
    assert found == pytest.approx(0.0, abs=expansion_error(x, x @ dense.T, dense))


def test_the_factor_is_that_of_the_inverse() -> None:
    x = text()
    hessian = Hessian(x.T @ x, len(x))
    order = np.random.default_rng(0).permutation(24)
    upper = upper_factor(hessian, torch.from_numpy(order), 0.01).numpy()
    assert np.array_equal(upper, np.triu(upper))
    damped = x.T @ x + 0.01 * hessian.mean_diagonal * np.eye(24)
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    # An inverse is off by as much as its condition makes of the matrix's own roundings.
    error = sum_error(24 + len(x), np.linalg.cond(damped))
    assert error < 1e-6
    assert_near(upper.T @ upper, inverse, float(error))


@pytest.mark.parametrize("kind", ["dead", "singular", "zero"])
def test_singular_hessians_have_a_factor(kind: str) -> None:
    x = text()
    x[:, 3] = 0
    if kind == "singular":
        x = x[:5]
    if kind == "zero":
        x = 0 * x
    hessian = Hessian(x.T @ x, len(x))
    assert hessian.dead[3]
    upper = upper_factor(hessian, torch.arange(24), 0.003).numpy()
    assert np.all(np.isfinite(upper)) and np.all(np.diag(upper) > 0)


def test_what_is_refused() -> None:
    sums = MomentSums("layer 3", 24, {})
    with pytest.raises(UsageError, match="layer 3"):
        sums.result()
    with pytest.raises(ShapeError, match="24"):
        sums.add(torch.zeros(4, 23), {})
    bad = torch.zeros(4, 24)
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="inputs of layer 3 hold 1"):
        sums.add(bad, {})
    with pytest.raises(NonFiniteError, match="positive definite"):
        upper_factor(Hessian(-np.eye(4), 1), torch.arange(4), 0.01)
    sums = MomentSums("x", 24, {"w": 2})
    with pytest.raises(ShapeError, match="tokens"):
        sums.add(torch.zeros(4, 24), {"w": torch.zeros(3, 2)})
    with pytest.raises(NonFiniteError, match="outputs of w"):
        sums.add(torch.zeros(4, 24), {"w": torch.full((4, 2), float("inf"))})
