"""What each head adds: its share of an output projection's input, through that projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["by_head", "gives_tensor", "is_projection", "projection_bias", "projection_weight"]


@torch.no_grad()
def projection_weight(projection: nn.Module, width: int) -> Tensor:
    """The matrix of a linear map, [d_in, d_out], without its bias.

    A module that only wraps a linear map (packed weights, adapters), or whose weight is a tensor of
    another library's class (quantized, and not every operation known), is asked with unit vectors.

    Args:
        projection: the linear map.
        width: d_in.
    """
    weight = getattr(projection, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and type(projection) in (nn.Linear, Conv1D)
    if isinstance(weight, Tensor) and plain and not weight.is_meta:
        return weight.T if isinstance(projection, nn.Linear) else weight
    like = next(iter((*projection.parameters(), *projection.buffers())))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    # What brings offloaded weights into memory for a call brings its input to them.
    unit = torch.eye(width, dtype=dtype, device="cpu" if like.is_meta else like.device)
    made: Tensor = projection(unit[None])[0] - projection_bias(projection, unit)
    return made


@torch.no_grad()
def projection_bias(projection: nn.Module, value: Tensor) -> Tensor:
    """What a linear map with a bias gives for zeros: [d_out].

    Args:
        projection: the linear map.
        value: an input of it, for dtype, device and width.
    """
    made: Tensor = projection(value.new_zeros((1, 1, value.shape[-1])))
    return made.reshape(-1)


@torch.no_grad()
def gives_tensor(projection: nn.Module, value: Tensor) -> bool:
    """Whether a module gives one tensor and nothing beside it (integer arithmetic: a scale).

    Args:
        projection: the module.
        value: an input of it, for dtype, device and width.
    """
    return isinstance(projection(value.new_zeros((1, 1, value.shape[-1]))), Tensor)


def is_projection(module: nn.Module) -> bool:
    """Whether a module without children has one weight matrix: a linear layer, however stored."""
    if any(True for _ in module.children()) or isinstance(module, nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.dim() == 2
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.dim() == 2 for tensor in tensors)


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
