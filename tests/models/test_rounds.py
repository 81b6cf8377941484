"""Models that run their blocks several times: one layer for each run, in the order of the runs."""

from __future__ import annotations

import pytest
import torch

from tinymodels import build, forward_kwargs, prompt_ids
from trilens.edits import Scale
from trilens.errors import AnatomyError
from trilens.lens.lens import Lens


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens(build("hrm_text"))


def test_layers_are_runs_of_blocks(lens: Lens) -> None:
    paths = [block.path for block in lens.anatomy.blocks]
    assert lens.n_layers == len(paths) == 8
    assert len(set(paths)) == 4
    assert paths[:4] == paths[4:]
    assert lens.anatomy.starts == (2, 4, 6)
    assert "4 rounds" in lens.anatomy.facts[0]


def test_residuals_are_those_of_the_runs(lens: Lens) -> None:
    ids = prompt_ids("hrm_text", 12)
    seen: list[torch.Tensor] = []
    blocks = {id(block.module): block.module for block in lens.anatomy.blocks}.values()
    handles = [
        each.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
        for each in blocks
    ]
    kwargs = {**forward_kwargs("hrm_text", ids), "use_cache": False}
    with torch.no_grad():
        logits = lens.model(**kwargs).logits
    for handle in handles:
        handle.remove()
    found = lens.capture(ids, residual="all", sites=["final_norm", "resid_pre"])
    assert torch.equal(found.logits, logits[0])
    for layer, stream in enumerate(seen):
        assert torch.equal(found.residual[layer], stream[0])
    head = lens.model.lm_head(found.sites["final_norm"])
    assert torch.equal(head, logits[0])
    assert torch.equal(found.sites["resid_pre", 1], found.residual[0])
    # A round begins with a sum of what earlier ones gave.
    assert not torch.equal(found.sites["resid_pre", 2], found.residual[1])


def test_an_edit_is_of_one_run_alone(lens: Lens) -> None:
    ids = prompt_ids("hrm_text", 12)
    plain = lens.capture(ids, residual="all")
    edited = lens.capture(ids, residual="all", edits=Scale("resid_post", 2.0, layer=4))
    for layer in range(4):
        assert torch.equal(edited.residual[layer], plain.residual[layer])
    assert torch.equal(edited.residual[4], 2 * plain.residual[4])
    assert not torch.equal(edited.logits, plain.logits)


@pytest.mark.parametrize(("model_type", "positions"), [("prophetnet", 33), ("reformer", 16)])
def test_rows_that_are_no_tokens_are_refused_by_name(model_type: str, positions: int) -> None:
    with pytest.raises(AnatomyError, match=f"run over {positions} positions for 11 tokens"):
        Lens(build(model_type))


def test_codebooks_are_refused_by_name() -> None:
    with pytest.raises(AnatomyError, match="reads 2 codebooks of audio"):
        Lens(build("musicgen"))
