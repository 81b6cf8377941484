"""The calibrated rules: each step against a reference, and what they must never do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tolerances import sum_error
from trilens.errors import NonFiniteError, ShapeError, UsageError
from trilens.ternary.calibrated import descent
from trilens.ternary.calibrated import numpy_kernels as descent_plain
from trilens.ternary.calibrated.hessian import Hessian, Moments
from trilens.ternary.calibrated.rules import (
    CALIBRATED_RULES,
    calibrate,
    check_rule,
    n_planes_of,
    refine,
)
from trilens.ternary.granularity import Units, resolve_units
from trilens.ternary.quantize import PerLayerQuant

LAYOUTS = {"tensor": None, "row": None, "group": 16}


def case(
    rows: int = 12, cols: int = 40, tokens: int = 300, seed: int = 0
) -> tuple[torch.Tensor, Hessian]:
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((cols, cols)) * np.exp(generator.standard_normal(cols))
    x = generator.standard_normal((tokens, cols)) @ mix / cols
    return torch.from_numpy(generator.standard_normal((rows, cols))), Hessian(x.T @ x, tokens)


def grid_of(weights: torch.Tensor, per: str, planes: int) -> descent.Grid:
    units = resolve_units(*weights.shape, per, LAYOUTS[per])  # type: ignore[arg-type]
    rule = "exact" if planes == 1 else "planes"
    quant = PerLayerQuant.quantize(
        weights, "w", rule=rule, per=units.per, group_size=units.group_size  # type: ignore[arg-type]
    )  # fmt: skip
    scales = [quant.scales]
    trits = [quant.trits]
    if quant.second_trits is not None:
        scales.append(np.asarray(quant.second_scale, dtype=np.float32).reshape(-1))
        trits.append(quant.second_trits)
    grid = descent.Grid.empty(units, np.stack(scales, axis=1))
    return replace(grid, trits=torch.stack(trits, dim=1))


def gptq_by_elimination(
    grid: descent.Grid, target: torch.Tensor, hessian: Hessian, damping: float
) -> np.ndarray:
    """The optimal-brain update, one column at a time, with an inverse of what is left each time."""
    work = target.numpy().copy()
    order = descent.coding_order(hessian).tolist()
    full = hessian.matrix.numpy() + damping * hessian.mean_diagonal * np.eye(len(order))
    scales, groups = grid.scales.numpy(), grid.groups.numpy()
    trits = np.zeros(tuple(grid.trits.shape), dtype=np.int8)
    while order:
        inverse = np.linalg.inv(full[np.ix_(order, order)])
        j = order[0]
        found, value = descent_plain.nearest(work[:, j], scales[:, groups[j]])
        trits[:, :, j] = found
        step = (work[:, j] - value) / inverse[0, 0]
        work[:, order[1:]] -= step[:, None] * inverse[0, 1:]
        order = order[1:]
    return trits


def slack_of(weights: torch.Tensor, grid: descent.Grid, hessian: Hessian, terms: int) -> float:
    """What a loss may be off by that is added up otherwise."""
    spread = (weights - grid.weights()).abs()
    return float(sum_error(terms, float((spread @ hessian.matrix.abs() * spread).sum())))


@pytest.mark.parametrize("per", LAYOUTS)
@pytest.mark.parametrize("planes", [1, 2])
def test_coding_in_order_is_the_optimal_brain_update(per: str, planes: int) -> None:
    weights, hessian = case()
    grid = grid_of(weights, per, planes)
    found = descent.code_in_order(grid, weights, hessian, damping=0.01)
    assert np.array_equal(found.trits, gptq_by_elimination(grid, weights, hessian, 0.01))


def test_blocks_of_columns_change_nothing() -> None:
    """More columns than are coded together."""
    weights, hessian = case(rows=3, cols=300, tokens=2000)
    grid = grid_of(weights, "group", 1)
    found = descent.code_in_order(grid, weights, hessian, damping=0.01)
    assert np.array_equal(found.trits, gptq_by_elimination(grid, weights, hessian, 0.01))


@pytest.mark.parametrize("planes", [1, 2])
def test_compiled_and_plain_loops_give_the_same_bits(planes: int) -> None:
    weights, hessian = case(rows=70)
    grid = grid_of(weights, "group", planes)
    coded = [
        descent.code_in_order(grid, weights, hessian, damping=0.01, backend=backend)
        for backend in ("numpy", "compiled")
    ]
    assert np.array_equal(coded[0].trits, coded[1].trits)
    improved = [
        descent.improve_trits(coded[0], weights, hessian, backend=backend)
        for backend in ("numpy", "compiled")
    ]
    assert np.array_equal(improved[0][0].trits, improved[1][0].trits)
    assert improved[0][1] == improved[1][1] > 0


@pytest.mark.parametrize("per", LAYOUTS)
@pytest.mark.parametrize("rule", CALIBRATED_RULES)
def test_loops_of_other_devices_do_the_same(
    rule: str, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's loops, which run on any device, here on the processor beside its own."""
    weights, hessian = case(rows=33)
    options = {"rule": rule, "per": per, "group_size": LAYOUTS[per]}
    wanted = calibrate(weights, "w", Moments.of(weights, hessian), **options)  # type: ignore[arg-type]
    plain = descent._loops
    monkeypatch.setattr(descent, "_loops", lambda like, _backend: plain(like, "torch"))
    found = calibrate(weights, "w", Moments.of(weights, hessian), **options)  # type: ignore[arg-type]
    assert torch.equal(found.quant.trits, wanted.quant.trits)
    assert found.output_error == pytest.approx(wanted.output_error, rel=1e-6)
    assert found.changes == wanted.changes and (found.changes > 0) == rule.startswith("best")
    for one, other in (
        (found.quant.scale, wanted.quant.scale),
        (found.quant.second_scale, wanted.quant.second_scale),
    ):
        assert (one is None) == (other is None)
        assert one is None or np.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("planes", [1, 2])
def test_coordinate_descent_goes_on_where_torch_s_loops_end(planes: int) -> None:
    """Both end where no single trit helps."""
    weights, hessian = case(rows=20)
    grid = grid_of(weights, "group", planes)
    there, changes = descent.improve_trits(grid, weights, hessian, backend="torch")
    assert changes > 0
    assert descent.improve_trits(there, weights, hessian, backend="numpy")[1] == 0


@pytest.mark.parametrize("per", LAYOUTS)
@pytest.mark.parametrize("planes", [1, 2])
def test_refitted_scales_are_the_least_squares_solution(per: str, planes: int) -> None:
    weights, hessian = case()
    grid = grid_of(weights, per, planes)
    found = descent.refit_scales(grid, weights, hessian)
    root = np.linalg.cholesky(hessian.matrix.numpy() + 1e-12 * np.eye(len(hessian.matrix)))
    units, n_units = grid.units, len(grid.unit_scales)
    design = np.zeros((weights.numel(), n_units * planes))
    for unit, plane in itertools.product(range(n_units), range(planes)):
        one = np.zeros((n_units, planes))
        one[unit, plane] = 1
        part = replace(grid, scales=descent.Grid.empty(units, one).scales)
        design[:, unit * planes + plane] = (part.weights().numpy() @ root).reshape(-1)
    wanted = np.linalg.lstsq(design, (weights.numpy() @ root).reshape(-1), rcond=None)[0]
    assert found.unit_scales.numpy().reshape(-1) == pytest.approx(
        np.abs(wanted), rel=1e-4, abs=1e-6
    )
    assert descent.loss(found, weights, hessian) < descent.loss(grid, weights, hessian)


@pytest.mark.parametrize("planes", [1, 2])
def test_no_single_change_of_a_trit_helps_after_descent(planes: int) -> None:
    weights, hessian = case(rows=4, cols=24)
    grid, changes = descent.improve_trits(grid_of(weights, "group", planes), weights, hessian)
    least = descent.loss(grid, weights, hessian)
    assert changes > 0
    levels = list(itertools.product((-1, 0, 1), repeat=planes))
    for row, col, level in itertools.product(range(4), range(24), levels):
        trits = grid.trits.clone()
        trits[row, :, col] = torch.tensor(level, dtype=torch.int8)
        changed = replace(grid, trits=trits)
        slack = slack_of(weights, changed, hessian, weights.numel() * 24)
        assert slack < 1e-8 * least
        assert descent.loss(changed, weights, hessian) >= least - slack


@pytest.mark.parametrize("planes", [1, 2])
def test_each_turn_lowers_the_loss(planes: int) -> None:
    weights, hessian = case()
    grid = descent.code_in_order(grid_of(weights, "group", planes), weights, hessian, damping=0.01)
    losses = [descent.loss(grid, weights, hessian)]
    for _ in range(4):
        grid = descent.refit_scales(grid, weights, hessian)
        losses.append(descent.loss(grid, weights, hessian))
        grid, _ = descent.improve_trits(grid, weights, hessian)
        losses.append(descent.loss(grid, weights, hessian))
    # A turn that changes nothing more may still be added up otherwise.
    slack = slack_of(weights, grid, hessian, weights.numel() * 40)
    assert all(after <= before + slack for before, after in itertools.pairwise(losses))
    refined, _ = refine(grid, weights, hessian, name="w")
    assert descent.loss(refined, weights, hessian) <= losses[-1] + slack


@pytest.mark.parametrize("per", LAYOUTS)
def test_rules_in_the_order_of_their_worth(per: str) -> None:
    weights, hessian = case(rows=32)
    moments = Moments.of(weights, hessian)
    options = {"per": per, "group_size": LAYOUTS[per]}

    def error(rule: str) -> float:
        found = calibrate(weights, "w", moments, rule=rule, **options)  # type: ignore[arg-type]
        again = moments.output_error(found.quant.reconstruct())
        assert found.output_error == again
        assert found.quant.rule == rule
        assert (found.quant.second_trits is not None) == (n_planes_of(rule) == 2)
        return again

    def plain(rule: str) -> float:
        quant = PerLayerQuant.quantize(weights, "w", rule=rule, **options)  # type: ignore[arg-type]
        return moments.output_error(quant.reconstruct())

    assert error("best") < error("gptq") < plain("exact")
    assert error("best_planes") < error("gptq_planes") < plain("planes") < error("best")


@pytest.mark.parametrize("rule", CALIBRATED_RULES)
@pytest.mark.parametrize("kind", ["few tokens", "dead", "no input", "one token", "zero rows"])
def test_hard_hessians_and_weights(rule: str, kind: str) -> None:
    weights, hessian = case()
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 40))
    if kind == "few tokens":
        x = x[:7]
    if kind == "dead":
        x[:, ::3] = 0
    if kind == "no input":
        x[:] = 0
    if kind == "one token":
        x[:] = x[0]
    if kind == "zero rows":
        weights[::2] = 0
    hessian = Hessian(x.T @ x, len(x))
    found = calibrate(weights, "w", Moments.of(weights, hessian), rule=rule, group_size=16)
    values = found.quant.reconstruct().numpy()
    assert np.all(np.isfinite(values))
    assert found.output_error < 0.3
    if kind == "dead":
        assert found.dead_channels == 14
        assert np.any(values[:, ::3] != 0)  # rounded, not thrown away
    if kind == "zero rows":
        assert not np.any(values[::2])


@pytest.mark.parametrize("rule", CALIBRATED_RULES)
def test_ternary_weights_are_kept(rule: str) -> None:
    _, hessian = case()
    trits = torch.randint(-1, 2, (12, 40), generator=torch.Generator().manual_seed(0))
    weights = 0.37 * trits.float()
    found = calibrate(weights, "w", Moments.of(weights, hessian), rule=rule)
    assert found.quant.was_ternary and found.damping is None
    assert torch.equal(found.quant.reconstruct(), weights)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_values_of_their_dtype(dtype: str) -> None:
    weights, hessian = case()
    found = calibrate(
        weights,
        "w",
        Moments.of(weights, hessian),
        rule="best_planes",
        group_size=16,
        scale_dtype=dtype,  # type: ignore[arg-type]
    )
    for scale in (found.quant.scale, found.quant.second_scale):
        values = torch.from_numpy(np.asarray(scale))
        assert torch.equal(values, values.to(getattr(torch, dtype)).float())


def test_the_groups_are_those_of_neighbouring_columns() -> None:
    """The order of coding does not show in the layout: Ŵ is trit × its own group's scale."""
    weights, hessian = case()
    quant = calibrate(weights, "w", Moments.of(weights, hessian), rule="best", group_size=16).quant
    assert quant.units == Units(12, 40, "group", 16)
    scales = np.asarray(quant.scale)
    spread = np.repeat(scales, 16, axis=1)[:, :40]
    assert np.array_equal(quant.reconstruct().numpy(), spread * quant.trits.numpy())


def test_what_is_refused() -> None:
    weights, hessian = case()
    moments = Moments.of(weights, hessian)
    with pytest.raises(UsageError, match="best_planes"):
        calibrate(weights, "w", moments, rule="exact")
    with pytest.raises(UsageError, match="gptq"):
        check_rule("gtpq")
    with pytest.raises(ShapeError, match="moments of 'w'"):
        calibrate(weights[:, :30], "w", moments)
    weights[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match="'w'"):
        calibrate(weights, "w", moments)
