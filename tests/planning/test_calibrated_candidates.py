"""Calibrated rules among what a matrix can become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensitivity_cases import blocks, opened
from tolerances import assert_close_sums
from trilens.checkpoint import TernaryPlan
from trilens.lens.lens import Lens
from trilens.planning.calibrated_candidates import hessians_of, with_text
from trilens.planning.candidates import data_free
from trilens.planning.matrices import ModelMatrix, find_matrices
from trilens.planning.planning import make_plan
from trilens.planning.predictor import output_error
from trilens.planning.result import PlanOptions
from trilens.taps.parameters import checksum
from trilens.ternary.calibrated.rules import CALIBRATED_RULES

OPTIONS = {"scale_dtype": "float16", "storage": "compact"}


@pytest.fixture(scope="module")
def lens(tmp_path_factory: pytest.TempPathFactory) -> Lens:
    return opened("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba"])
def test_hessians_are_those_of_the_inputs(model_type: str, tmp_path: Path) -> None:
    lens = opened(model_type, tmp_path)
    matrices = find_matrices(lens)
    matrix = matrices[-1]
    seen: list[torch.Tensor] = []
    module = lens.model.get_submodule(matrix.target.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()[0]))
    text = blocks(model_type, 3)
    try:
        found = hessians_of(lens, matrices, text)
    finally:
        handle.remove()
    inputs = torch.cat(seen).double()
    assert found[matrix.target].n_tokens == len(inputs) == sum(len(ids) for ids in text)
    terms = inputs.abs().T @ inputs.abs()
    assert_close_sums(found[matrix.target].matrix, inputs.T @ inputs, terms, len(inputs))
    assert not module._forward_pre_hooks


def test_every_calibrated_rule_is_offered_and_leaves_less_error(lens: Lens) -> None:
    text = blocks("llama", 4)
    matrices = find_matrices(lens)
    offered = with_text(hessians_of(lens, matrices, text))
    matrix = matrices[0]
    found = offered(matrix, **OPTIONS)
    three = {name for name, rule in CALIBRATED_RULES.items() if rule.levels == 3}
    # Five codes to a byte hold three levels: the rules with four are there with two bits alone.
    assert {each.entry.rule for each in found} & {*CALIBRATED_RULES, "quad"} == three
    two_bit = offered(matrix, scale_dtype="float16", storage="two_bit")
    assert {each.entry.rule for each in two_bit} >= {*CALIBRATED_RULES, "quad"}
    named = {each.name: each for each in found}
    own = lens.model.get_parameter(matrix.target).detach()
    seen: list[torch.Tensor] = []
    module = lens.model.get_submodule(matrix.target.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()[0]))
    hessians_of(lens, [matrix], text)
    handle.remove()
    error = {
        rule: output_error(matrix, own, named[f"{rule} row"].apply(matrix, own), torch.cat(seen))
        for rule in ("exact", "gptq", "best", "planes", "best_planes")
    }
    assert error["exact"] > error["gptq"] > error["best"] > error["planes"] > error["best_planes"]
    # The same bits as the rules they begin with.
    assert named["best row"].size_bytes(matrix) == named["exact row"].size_bytes(matrix)


def test_matrices_without_inputs_have_the_other_rules(tmp_path: Path, lens: Lens) -> None:
    mixtral = opened("mixtral", tmp_path)
    matrices = find_matrices(mixtral)
    offered = with_text(hessians_of(mixtral, matrices, blocks("mixtral", 3)))
    experts = next(matrix for matrix in matrices if matrix.lead)
    assert len(offered(experts, **OPTIONS)) == len(data_free(experts, **OPTIONS))
    matrix = find_matrices(lens)[0]
    short = with_text(hessians_of(lens, [matrix], [blocks("llama", 1)[0][:8]]))
    assert len(short(matrix, **OPTIONS)) == len(data_free(matrix, **OPTIONS))


def test_a_plan_takes_the_rules_with_less_error(tmp_path: Path) -> None:
    lens = opened("llama", tmp_path / "src")
    before = checksum(dict(lens.model.named_parameters()))
    text = blocks("llama", 4)
    offered = with_text(hessians_of(lens, find_matrices(lens), text))

    def few(matrix: ModelMatrix, **options: object) -> list:
        wanted = {"exact row", "gptq row", "best row", "planes row", "best_planes row"}
        return [each for each in offered(matrix, **options) if each.name in wanted]

    planned = make_plan(
        lens, text, text, options=PlanOptions(budget_bits=5, costs="predicted"), candidates=few
    )
    assert checksum(dict(lens.model.named_parameters())) == before
    rules = {entry.rule for entry in planned.plan.matrices.values()}
    assert rules <= {"best", "best_planes", "gptq", "gptq_planes"}
    assert TernaryPlan.from_json(planned.plan.to_json()) == planned.plan
