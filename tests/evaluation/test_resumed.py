"""Passes that begin at a block give what whole passes give; where they cannot, they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from sensitivity_cases import blocks
from tinymodels import build
from trilens.evaluation.reference import ReferenceLogits
from trilens.io import spilled
from trilens.lens.lens import Lens
from trilens.planning.matrices import ModelMatrix, find_matrices
from trilens.taps.parameters import swapped


def each_layer(lens: Lens) -> list[ModelMatrix]:
    """The last matrix of every block."""
    return list({matrix.layer: matrix for matrix in find_matrices(lens)}.values())


def reference_of(lens: Lens, model_type: str) -> ReferenceLogits:
    """Batches of two lengths."""
    ids = [*blocks(model_type), blocks(model_type, 1, 7)[0]]
    return ReferenceLogits(lens, ids, resumable=True)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    found: list[int] = []
    handle = module.register_forward_hook(lambda *_: found.append(1))
    try:
        yield found
    finally:
        handle.remove()


# Plain, transposed, experts, recurrent, hybrid with shared blocks, keys of earlier layers, one
# stack that runs several times.
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_oss", "mamba", "zamba2", "gemma3n_text", "hrm_text"]
)
def test_a_change_is_measured_as_by_whole_passes(model_type: str) -> None:
    lens = Lens(build(model_type))
    reference = reference_of(lens, model_type)
    firsts = {}
    for matrix in each_layer(lens):
        firsts[matrix.layer] = first = reference.first_block([matrix.target])
        assert first in {0, matrix.layer}
        changed = {matrix.target: 1.5 * lens.model.get_parameter(matrix.target).detach()}
        with swapped(lens.model, changed):
            found = reference.measure(first_block=first)
            assert found == reference.measure()
        assert found.kl_nats > 0
    if model_type in {"llama", "gpt2", "gpt_oss", "mamba"}:
        assert all(first == layer for layer, first in firsts.items())
    assert not any("forward" in vars(module) for module in lens.model.modules())
    assert not any(module._forward_hooks for module in lens.model.modules())


def test_what_comes_before_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "KEPT_BYTES", 0)  # what blocks gave lies in a file
    lens = Lens(build("llama"))
    reference = reference_of(lens, "llama")
    last = each_layer(lens)[-1]
    first = reference.first_block([last.target])
    assert first == last.layer == lens.n_layers - 1
    before, own = (lens.anatomy.blocks[layer].module.mlp for layer in (0, first))
    with calls_of(before) as skipped, calls_of(own) as ran:
        assert reference.measure(first_block=first).kl_nats == 0
    assert (len(skipped), len(ran)) == (0, 2)
    # Together with a matrix of the first block, or one that is in no block, all of them run.
    names = [last.target, each_layer(lens)[0].target]
    assert reference.first_block(names) == 0
    assert reference.first_block([last.target, "model.embed_tokens.weight"]) == 0
    assert ReferenceLogits(lens, blocks("llama")).first_block([last.target]) == 0


def test_what_goes_past_the_blocks_is_noticed() -> None:
    """The last block reads what is inside the first one, in another batch by then."""
    lens = Lens(build("llama"))
    first, *_, last = (block.module for block in lens.anatomy.blocks)
    kept: list[Any] = []

    def keep(_module: nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        kept[:] = [output]

    def add(_module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + kept[0].mean()

    first.mlp.register_forward_hook(keep)
    last.mlp.register_forward_hook(add)
    reference = reference_of(lens, "llama")
    matrix = each_layer(lens)[-1]
    assert reference.first_block([matrix.target]) == 0
