"""What each head adds: its share of an output projection's input, through that projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["by_head", "projection_weight"]


@torch.no_grad()
def projection_weight(projection: nn.Module, width: int) -> Tensor:
    """The matrix of a linear map, [d_in, d_out], without its bias.

    A module that only wraps a linear map (packed weights, adapters) is asked with unit vectors.

    Args:
        projection: the linear map.
        width: d_in.
    """
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and type(projection) in (nn.Linear, Conv1D):
        return weight.T if isinstance(projection, nn.Linear) else weight
    like = next(iter((*projection.parameters(), *projection.buffers())))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    unit = torch.eye(width, dtype=dtype, device=like.device)
    made: Tensor = projection(unit[None])[0] - projection(torch.zeros_like(unit[None, :1]))[0]
    return made


def by_head(parts: Tensor, projection: nn.Module) -> Tensor:
    """What each head adds through the projection, without its bias.

    Args:
        parts: the projection's input, [batch, seq, heads, d_head].
        projection: a linear map from heads · d_head.

    Returns:
        [batch, seq, heads, d_model].

    Memory
        heads times the size of the residual stream.
    """
    heads, width = parts.shape[-2:]
    weight = projection_weight(projection, heads * width).reshape(heads, width, -1).to(parts.dtype)
    return torch.einsum("bshd,hdm->bshm", parts, weight)
