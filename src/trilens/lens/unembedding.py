"""The model's own final norm and unembedding, applied to a residual stream."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilens.errors import ShapeError, UsageError
from trilens.models.anatomy import Anatomy
from trilens.models.trace import tensors_in

__all__ = ["reads_in_parts", "unembedded"]


def reads_in_parts(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether some tokens' logits cost their share of the vocabulary: the last step is linear."""
    last = anatomy.unembedding[-1] if anatomy.unembedding else ""
    module = dict(model.named_modules(remove_duplicate=False)).get(last)
    return module is not None and _is_plain(module)


def unembedded(
    model: nn.Module, anatomy: Anatomy, residual: Tensor, tokens: slice | Tensor | None = None
) -> Tensor:
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
    for path in anatomy.unembedding[:-1]:
        values = _through(modules[path], values)
    last = modules[anatomy.unembedding[-1]]
    if tokens is not None and _is_plain(last):
        rows = slice(anatomy.vocab)
        bias = None if last.bias is None else last.bias[rows][tokens]
        weight = last.weight[rows][tokens]
        values = F.linear(values.to(weight.dtype), weight, bias)
    else:
        values = _through(last, values)[..., : anatomy.vocab]
        values = values if tokens is None else values[..., tokens]
    values = values * anatomy.logit_scale
    cap = anatomy.logit_softcap
    if cap is not None:
        values = cap * torch.tanh(values / cap)
    return values.reshape(*residual.shape[:-1], values.shape[-1])


def _through(module: nn.Module, values: Tensor) -> Tensor:
    weight = next(module.parameters(), values)
    return next(tensors_in(module(values.to(weight.dtype))))


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A matrix in memory, read by nobody else: hooks and a `forward` of its own see whole calls."""
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        and not module.weight.is_meta
    )
