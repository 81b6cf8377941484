"""The dtype in which autocast would multiply: products of packed codes are hidden from it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast_as_autocast"]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on; else that of the inputs, as float64 always is."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def cast_as_autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs and bias as autocast, which is on, would multiply and add them."""
    if x.dtype == torch.float64:
        return x, bias
    dtype = autocast_dtype(x)
    return x.to(dtype), None if bias is None else bias.to(dtype)
