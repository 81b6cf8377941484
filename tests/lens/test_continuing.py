"""Texts gone on from at once: what the model's own code raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinymodels import build, prompt_ids
from trilens.errors import GenerationError
from trilens.evaluation.continuations import continuations
from trilens.lens.continuing import continue_batch


def test_a_model_that_fails_is_named() -> None:
    model = build("xlstm")
    ids = torch.cat([prompt_ids("", 6)] * 2)
    with pytest.raises(GenerationError, match=r"xLSTM.* does not go on from 2 texts of 6 tokens"):
        continue_batch(model, ids, max_new_tokens=3)
    with pytest.raises(GenerationError, match="does not go on from 2 texts"):
        continuations(model, list(ids), new=3)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_full_memory_is_no_fault_of_the_model(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")

    def full(*_: Any, **__: Any) -> None:
        raise kind("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(kind, match="allocate memory"):
        continue_batch(model, prompt_ids("", 6), max_new_tokens=3)
    monkeypatch.undo()
    assert continue_batch(model, prompt_ids("", 6), max_new_tokens=3).shape == (1, 9)
