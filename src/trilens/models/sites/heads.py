"""The output projection of attention: each head's part of what it gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["head_parts", "is_projection", "projection_bias"]


def is_projection(module: nn.Module) -> bool:
    """Whether a module without children has one weight matrix: a linear layer, however stored."""
    if any(True for _ in module.children()) or isinstance(module, nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.dim() == 2
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.dim() == 2 for tensor in tensors)


def head_parts(projection: nn.Module, value: Tensor, heads: int) -> Tensor:
    """What the projection makes of each head alone, without its bias.

    Args:
        projection: an affine module.
        value: its input [batch, seq, heads · d_head], any leading axes.
        heads: how many equal parts the last axis has.

    Returns:
        [..., heads, d_model]; with the bias they sum to the projection's output within rounding.
    """
    split = value.reshape(*value.shape[:-1], heads, -1)
    weight = _matrix(projection)
    if weight is not None:
        by_head = weight.reshape(heads, split.shape[-1], -1).to(value.device)
        return torch.einsum("...hd,hdm->...hm", split, by_head.to(value.dtype))
    # Packed, wrapped or offloaded weights: the module itself, on one head at a time.
    alone = torch.eye(heads, dtype=value.dtype, device=value.device)[:, :, None]
    each = [(split * mask).flatten(-2) for mask in alone]
    bias = projection_bias(projection, value)
    return torch.stack([projection.forward(part) - bias for part in each], dim=-2)


def projection_bias(projection: nn.Module, value: Tensor) -> Tensor:
    """What the projection gives for zeros: [d_model].

    Args:
        projection: an affine module.
        value: an input of it, for dtype, device and width.
    """
    zeros = value.new_zeros((1, 1, value.shape[-1]))
    return projection.forward(zeros).reshape(-1)  # type: ignore[no-any-return]


def _matrix(projection: nn.Module) -> Tensor | None:
    """The weight as [in, out] where the class keeps it plainly."""
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    if type(projection) is nn.Linear:
        return weight.T
    if type(projection).__name__ == "Conv1D" and hasattr(projection, "nf"):
        return weight
    return None
