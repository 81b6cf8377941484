"""What the first block reads: tokens and images as vectors, without running the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from trilens.errors import CaptureError
from trilens.models.anatomy import Anatomy
from trilens.models.trace import tensors_in
from trilens.taps.hooks import hooked
from trilens.taps.mode import evaluating, forgetting

__all__ = ["stack_input"]


class _ReachedError(Exception):
    """The pass has come as far as it is needed."""


def stack_input(model: nn.Module, anatomy: Anatomy, arguments: Mapping[str, Any]) -> Tensor:
    """The vectors [seq, d_model] that the first block is given for one prompt.

    The pass ends there: towers run, the blocks do not.

    Raises:
        CaptureError: the first block did not run, or was given no such vectors.
    """
    seen: list[Tensor] = []

    def reached(_module: nn.Module, args: Any, kwargs: Any) -> None:
        wide = (t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.ndim == 3)
        seen.extend(tensor for tensor in wide if tensor.shape[-1] == anatomy.d_model)
        raise _ReachedError

    with (
        evaluating(model),
        forgetting(model),
        torch.inference_mode(False),
        torch.no_grad(),
        hooked(model) as hooks,
    ):
        hooks.before(anatomy.blocks[0].module, reached, with_kwargs=True)
        with suppress(_ReachedError):
            model(**arguments)
    if not seen:
        raise CaptureError("the first block was given no vectors of the tokens")
    return seen[0][0] if anatomy.batch_first else seen[0][:, 0]
