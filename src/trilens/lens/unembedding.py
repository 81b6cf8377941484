"""The model's own final norm and unembedding, applied to a residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilens.errors import ShapeError, UsageError
from trilens.models.anatomy import Anatomy
from trilens.models.trace import tensors_in

__all__ = ["unembedded"]


def unembedded(model: nn.Module, anatomy: Anatomy, residual: Tensor) -> Tensor:
    """Logits [..., vocab] of a residual stream [..., d_model]; see `Lens.unembed`.

    Raises:
        UsageError: the model has no unembedding (a bare encoder).
        ShapeError: the last axis is not d_model.
    """
    if not anatomy.unembedding:
        raise UsageError(f"{type(model).__name__} has no unembedding: it gives no logits")
    if not isinstance(residual, Tensor) or residual.shape[-1:] != (anatomy.d_model,):
        shape = list(residual.shape) if isinstance(residual, Tensor) else residual
        raise ShapeError(
            f"residual is {shape!r}: a tensor [..., d_model] is needed, and this model's "
            f"d_model is {anatomy.d_model}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    values = residual.reshape(1, -1, anatomy.d_model) * anatomy.final_scale
    for path in anatomy.final_norm:
        values = next(tensors_in(modules[path](values)))
    for path in anatomy.unembedding:
        weight = next(modules[path].parameters(), values)
        values = next(tensors_in(modules[path](values.to(weight.dtype))))
    values = values[..., : anatomy.vocab] * anatomy.logit_scale
    cap = anatomy.logit_softcap
    if cap is not None:
        values = cap * torch.tanh(values / cap)
    return values.reshape(*residual.shape[:-1], values.shape[-1])
