"""A large matrix is priced by rows of it: the same error, and the same choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sensitivity_cases import blocks, opened
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.planning import sampled_rows
from trilens.planning.candidates import data_free, of_plan
from trilens.planning.matrices import ModelMatrix
from trilens.planning.planning import make_plan
from trilens.planning.predictor import output_error
from trilens.planning.result import PlanOptions
from trilens.planning.sampled_rows import sampled

MATRIX = ModelMatrix("w", ("w",), 0, "w", (), 64, 32, False, 4)


@pytest.mark.parametrize("lead", [(), (4,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_spread_over_the_matrix(
    lead: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_rows, "_WEIGHTS", 8 * 32 * (4 if lead else 1))
    matrix = replace(MATRIX, lead=lead, transposed=transposed)
    weights = torch.randn(*lead, 64, 32).movedim(-1, -2 if transposed else -1)
    part, values = sampled(matrix, weights)
    assert (part.rows, part.cols, part.lead) == (8, 32, lead)
    assert values.shape == (*lead, *((32, 8) if transposed else (8, 32)))
    for old, new in zip(matrix.of(weights), part.of(values), strict=True):
        assert torch.equal(new, old[[0, 9, 18, 27, 36, 45, 54, 63]])
    few = replace(matrix, rows=8)
    assert sampled(few, values) == (few, values)


def test_the_error_of_the_rows_is_that_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix = replace(MATRIX, rows=4096, cols=256)
    weights, inputs = torch.randn(4096, 256), torch.randn(40, 256)
    monkeypatch.setattr(sampled_rows, "_WEIGHTS", 512 * 256)
    part, rows = sampled(matrix, weights)
    for entry in (MatrixPlan("absmean", per="tensor"), MatrixPlan("planes", group_size=64)):
        candidate = of_plan(entry)
        of_all = output_error(matrix, weights, candidate.apply(matrix, weights), inputs)
        of_rows = output_error(part, rows, candidate.apply(part, rows), inputs)
        assert of_rows == pytest.approx(of_all, rel=0.03)


def test_a_plan_codes_all_rows_of_what_it_chose(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = opened("llama", tmp_path / "llama")
    options = PlanOptions(budget_bits=6, costs="predicted")
    seen: list[int] = []

    def noted(matrix: ModelMatrix, **given: Any) -> Any:
        seen.append(matrix.rows)
        return data_free(matrix, **given)

    whole = make_plan(lens, blocks("llama", 2), blocks("llama", 3)[2:], options=options)
    monkeypatch.setattr(sampled_rows, "_WEIGHTS", 1 << 10)
    found = make_plan(
        lens, blocks("llama", 2), blocks("llama", 3)[2:], options=options, candidates=noted
    )
    assert found.bits_per_weight <= 6
    assert found.bits_per_weight == pytest.approx(whole.bits_per_weight, rel=0.1)
    assert {choice.name for choice in found.choices} == {choice.name for choice in whole.choices}
    assert max(seen) > 16  # candidates are asked about the matrix, and counted as it is stored
