"""What a model's matrices get as input on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trilens.models.forward_call import device_of, forward_arguments
from trilens.taps.hooks import hooked
from trilens.taps.mode import evaluating

__all__ = ["observe_inputs"]


def observe_inputs(
    model: nn.Module,
    cols: Mapping[str, int],
    blocks: Sequence[Tensor],
    callback: Callable[[str, Tensor], None],
) -> None:
    """Run the model on a text and report the inputs of each matrix, pass by pass.

    Matrices whose inputs no module sees, such as experts kept in one tensor, are left out.

    Args:
        model: the model.
        cols: parameter name → length of what it multiplies.
        blocks: token ids, each int64 [tokens].
        callback: called with the name of the parameter and what it multiplies, [tokens, cols] on
            the model's device and in its dtype.
    """

    def listener(name: str, n_cols: int) -> Callable[..., None]:
        def observe(_module: nn.Module, arguments: tuple[object, ...]) -> None:
            x = arguments[0] if arguments else None
            if isinstance(x, Tensor) and x.shape[-1] == n_cols and x.numel():
                callback(name, x.detach().reshape(-1, n_cols))

        return observe

    with hooked(model) as hooks:
        for name, n_cols in cols.items():
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.Linear | Conv1D):
                hooks.before(module, listener(name, n_cols))
        for block in blocks:
            ids = block.reshape(1, -1).to(device_of(model))
            with evaluating(model), torch.inference_mode(False), torch.no_grad():
                model(**forward_arguments(model, ids, None))
