"""What a stack is given to read: the vectors of its positions, before its first block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import CaptureError, ShapeError
from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import given_arguments
from trilens.models.trace import tensors_in
from trilens.taps.hooks import hooked
from trilens.taps.mode import evaluating, forgetting

__all__ = ["positions_of", "vectors_of"]


class _ReachedError(Exception):
    """The first block began: what comes before it has run, and that is enough."""


def vectors_of(model: PreTrainedModel, anatomy: Anatomy, given: Mapping[str, Any]) -> Tensor:
    """The vectors that go into the first block, all streams in one: nothing after that runs.

    Returns:
        [positions, streams · d_model].

    Raises:
        CaptureError: the first block did not run.
        ShapeError: several prompts, or several images of a vision tower.
    """
    seen: list[Tensor] = []

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        seen.append(next(tensors_in((args, kwargs))))
        raise _ReachedError

    with evaluating(model), forgetting(model), hooked(model) as hooks, torch.no_grad():
        hooks.before(anatomy.blocks[0].module, before, with_kwargs=True)
        with suppress(_ReachedError):
            model(**given_arguments(model, given))
    if not seen:
        raise CaptureError(
            f"{anatomy.blocks[0].path}, the first block, did not run on these inputs: the model "
            "was changed since the lens was made"
        )
    form, given_first = anatomy.form, seen[0]
    if form.kind in ("inner", "leading") and given_first.dim() == 3:
        rows = given_first  # the block itself makes the streams
    else:
        rows = form.read(given_first)
    if len(rows) != 1:
        raise ShapeError(f"inputs hold {len(rows)} prompts or images: this stack is given one")
    return rows[0].flatten(1)


def positions_of(model: PreTrainedModel, anatomy: Anatomy, given: Mapping[str, Any]) -> int:
    """The positions that go into the first block.

    Raises:
        CaptureError: the first block did not run.
    """
    return len(vectors_of(model, anatomy, given))
