"""What a model's matrices get as input on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trilens.analysis.matrices import Matrix
from trilens.lens import Lens
from trilens.models.running import device_of, forward_arguments
from trilens.taps.mode import evaluating

__all__ = ["run_and_tell"]


def run_and_tell(
    lens: Lens,
    matrices: Sequence[Matrix],
    blocks: Sequence[Tensor],
    tell: Callable[[str, Tensor], None],
) -> None:
    """Run the model on a text and tell the inputs of each matrix, pass by pass.

    Experts kept in one tensor, and other matrices whose inputs no module sees, are left out.

    Args:
        lens: the model.
        matrices: of the model.
        blocks: token ids, each int64 [tokens].
        tell: called with the name of the parameter and what it multiplies, [tokens, cols] on the
            model's device and in its dtype.
    """

    def listener(name: str, cols: int) -> Callable[..., None]:
        def hear(_module: nn.Module, arguments: tuple[object, ...]) -> None:
            x = arguments[0] if arguments else None
            if isinstance(x, Tensor) and x.shape[-1] == cols and x.numel():
                tell(name, x.detach().reshape(-1, cols))

        return hear

    handles = []
    try:
        for matrix in matrices:
            module = lens.model.get_submodule(matrix.target.rpartition(".")[0])
            if not matrix.lead and isinstance(module, nn.Linear | Conv1D):
                hook = listener(matrix.target, matrix.cols)
                handles.append(module.register_forward_pre_hook(hook))
        for block in blocks:
            ids = block.reshape(1, -1).to(device_of(lens.model))
            with evaluating(lens.model), torch.inference_mode(False), torch.no_grad():
                lens.model(**forward_arguments(lens.model, ids, None))
    finally:
        for handle in handles:
            handle.remove()
