"""How many positions a stack has of what it is given, where that is not a number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import CaptureError
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import given_arguments
from trilens.models.trace import tensors_in
from trilens.taps.hooks import hooked
from trilens.taps.mode import evaluating

__all__ = ["positions_of"]


class _ReachedError(Exception):
    """The first block began: what comes before it has run, and that is enough."""


def positions_of(model: PreTrainedModel, anatomy: Anatomy, given: Mapping[str, Tensor]) -> int:
    """The positions that go into the first block; nothing after that runs.

    Raises:
        CaptureError: the first block did not run.
    """
    seen: list[int] = []

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        stream = next(tensors_in((args, kwargs)))
        seen.append(int(stream.shape[1 if anatomy.form.batch_first else 0]))
        raise _ReachedError

    with evaluating(model), hooked(model) as hooks, torch.no_grad():
        hooks.before(anatomy.blocks[0].module, before, with_kwargs=True)
        try:
            model(**given_arguments(model, given))
        except _ReachedError:
            return seen[0]
    raise CaptureError(
        f"{anatomy.blocks[0].path}, the first block, did not run on these inputs: the model was "
        "changed since the lens was made"
    )
