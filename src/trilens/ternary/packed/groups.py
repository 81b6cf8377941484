"""x · Ŵᵀ where each group of inputs has a matrix of its own, as the experts of a layer have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

from trilens.ternary.packed.autocast import autocast_dtype
from trilens.ternary.packed.matrix import Packed
from trilens.ternary.packed.multiply import multiply, multiply_back

__all__ = ["GroupProduct", "multiply_groups", "multiply_groups_back"]

GroupProduct: TypeAlias = Callable[[Tensor, Packed], Tensor]


def multiply_groups(
    x: Tensor,
    packed: Packed,
    ends: Tensor,
    product: GroupProduct = multiply,
) -> Tensor:
    """Each input by the matrix of its group. No gradient.

    Shapes: x [inputs, cols], sorted by group; packed [groups, rows, cols]; ends [groups] → [inputs,
    rows], in the dtype of x

    Args:
        x: the inputs; those behind the last end belong to no group and give zeros.
        packed: a matrix for each group.
        ends: where the inputs of each group end.
        product: of the inputs of one group.

    Memory: see `multiply`, one matrix at a time.
    """
    out = x.new_zeros(len(x), packed.codes.shape[-2], dtype=autocast_dtype(x))
    for group, start, stop in _spans(ends):
        out[start:stop] = product(x[start:stop], packed.lead(group))
    return out


def multiply_groups_back(grad: Tensor, packed: Packed, ends: Tensor) -> Tensor:
    """The gradient of `multiply_groups` with respect to x.

    Shapes: grad [inputs, rows]; packed [groups, rows, cols]; ends [groups] → [inputs, cols]
    """
    out = grad.new_zeros(len(grad), packed.cols)
    for group, start, stop in _spans(ends):
        out[start:stop] = multiply_back(grad[start:stop], packed.lead(group))
    return out


def _spans(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    start = 0
    for group, stop in enumerate(ends.tolist()):
        if stop > start:
            yield group, start, stop
        start = stop
