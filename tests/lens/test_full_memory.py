"""A full memory passes as what it is, and nothing is remembered of a model because of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tinymodels import build, prompt_ids
from trilens import Lens

WORDS = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"


@contextmanager
def full(model: torch.nn.Module) -> Iterator[None]:
    """Every pass ends as on a machine without memory."""

    def refuse(*_: object) -> None:
        raise RuntimeError(WORDS)

    handle = model.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        yield
    handle.remove()


def test_while_a_model_is_proven() -> None:
    model = build("llama")
    with full(model):
        Lens(model).capture(prompt_ids("", 4))
    assert Lens(model).capture(prompt_ids("", 4)).logits is not None


def test_while_decoding_steps_are_measured() -> None:
    lens = Lens(build("llama"))
    lens.capture(prompt_ids("", 4))
    with full(lens.model):
        lens.generate(prompt_ids("", 4), max_new_tokens=3)
    assert len(lens.generate(prompt_ids("", 4), max_new_tokens=3).token_ids) == 3


@pytest.mark.filterwarnings("ignore::trilens.errors.BeyondPositionsWarning")
def test_beyond_the_positions_and_on_inputs_of_a_caller() -> None:
    lens = Lens(build("llama"))
    lens.capture(prompt_ids("", 4))
    long = torch.ones(1, 161, dtype=torch.long)
    for given in ({"prompt": long}, {"inputs": {"input_ids": long[:, :5]}}):
        with full(lens.model):
            lens.capture(**given)
        lens.capture(**given)
