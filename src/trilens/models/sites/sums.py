"""Which calls are sums of streams or products, and how they are counted, in any pass alike.

A sum counts where its innermost running module, its owner, adds two tensors of one shape that hold
a row of `d_model` floating-point numbers for every token: [batch, seq, d_model],
[seq, batch, d_model], or those rows in one axis. The k-th such sum of the owner's call is the k-th
in every pass: sums over some of the tokens (experts) and sums with a weight never count. Products
with a weight count by the module whose own code makes them, where it is no linear layer itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["SUMS", "is_linear_call", "is_rowwise", "is_stream", "is_stream_sum"]

SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
"""Names of the torch functions that add two tensors."""


LINEAR = frozenset({"linear", "matmul", "__matmul__", "mm"})
"""Names of the torch functions that a module projects its input with."""


def is_linear_call(name: str, result: Any, tokens: int) -> bool:
    """Whether a call of a torch function is a product with a row per token, to be counted."""
    return name in LINEAR and is_rowwise(result, tokens)


def is_rowwise(value: Any, tokens: int) -> bool:
    """Whether a tensor of one prompt has a row of numbers per token and nothing else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        return False
    return value.dim() in (2, 3) and value.numel() == tokens * value.shape[-1] > 0


def is_stream(value: Any, batch: int, seq: int, d_model: int) -> bool:
    """Whether a tensor holds `d_model` numbers for each token of a batch."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    shape = tuple(value.shape)
    return shape in ((batch, seq, d_model), (seq, batch, d_model), (batch * seq, d_model))


def is_stream_sum(
    name: str, args: tuple[Any, ...], options: dict[str, Any], batch: int, seq: int, d_model: int
) -> bool:
    """Whether a call of a torch function is a sum of two streams, to be counted.

    Args:
        name: `__name__` of the torch function.
        args: its positional arguments.
        options: its keyword arguments.
        batch: prompts in the pass.
        seq: columns of the pass.
        d_model: width of the residual stream.
    """
    if name not in SUMS or len(args) < 2 or "alpha" in options:
        return False
    left, right = args[:2]
    if not is_stream(left, batch, seq, d_model) or not is_stream(right, batch, seq, d_model):
        return False
    return left.shape == right.shape and not any(_is_weight(each) for each in (left, right))


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)
