from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensitivity_cases import blocks, opened
from trilens.errors import ShapeError
from trilens.evaluation.reference import ReferenceLogits
from trilens.planning.matrices import find_matrices
from trilens.planning.predictor import gain, inputs_of, output_error
from trilens.statistics.ranks import rank_correlation
from trilens.taps.parameters import checksum


@given(st.permutations(range(8)))
def test_rank_correlation_of_different_values(order: list[int]) -> None:
    distance = sum((i - j) ** 2 for i, j in enumerate(order))
    found = rank_correlation([10.0**i for i in range(8)], order)
    assert found == pytest.approx(1 - 6 * distance / (8 * 63))


def test_rank_correlation_with_ties_and_without_meaning() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 · 5).
    assert rank_correlation([0, 1, 1, 2], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ShapeError, match="3 and 2"):
        rank_correlation([1, 2, 3], [1, 2])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_oss"])
def test_output_error_of_what_a_layer_gives(model_type: str, tmp_path: Path) -> None:
    lens = opened(model_type, tmp_path)
    matrices = find_matrices(lens)
    inputs = inputs_of(lens, matrices, blocks(model_type, 1))
    for matrix in matrices:
        if matrix.lead:
            assert matrix.target not in inputs
            continue
        module = lens.model.get_submodule(matrix.target.removesuffix(".weight"))
        weight = module.weight.detach().clone()
        bias = 0 if module.bias is None else module.bias.detach()
        with torch.no_grad():
            before = module(inputs[matrix.target]) - bias
            module.weight.mul_(0.5)
            after = module(inputs[matrix.target]) - bias
            module.weight.copy_(weight)
        wanted = float((before - after).square().sum() / before.square().sum())
        found = output_error(matrix, weight, 0.5 * weight, inputs[matrix.target])
        assert found == pytest.approx(wanted, rel=1e-3)
        assert found == pytest.approx(0.25, rel=1e-3)


def test_output_error_without_inputs_is_that_of_the_weights(tmp_path: Path) -> None:
    lens = opened("gpt_oss", tmp_path)
    matrix = next(m for m in find_matrices(lens) if m.lead)
    weight = lens.model.get_parameter(matrix.target).detach()
    assert output_error(matrix, weight, 0.9 * weight, None) == pytest.approx(0.01, rel=1e-3)
    assert output_error(matrix, 0 * weight, 0 * weight, None) == 0


def test_a_gain_is_the_same_again_and_leaves_nothing_behind(tmp_path: Path) -> None:
    lens = opened("llama", tmp_path)
    ids = blocks("llama")
    before = checksum(dict(lens.model.named_parameters()))
    reference = ReferenceLogits(lens, ids)
    matrix = find_matrices(lens)[0]
    inputs = inputs_of(lens, [matrix], ids)[matrix.target]
    found = gain(lens, matrix, reference, inputs)
    assert found == gain(lens, matrix, reference, inputs) > 0
    assert found != gain(lens, matrix, reference, inputs, seed=1)
    assert checksum(dict(lens.model.named_parameters())) == before
    assert not any(module._forward_pre_hooks for module in lens.model.modules())
