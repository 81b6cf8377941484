"""Rotations by Hadamard matrices: a layer's inputs and its weights rotated together.

For an orthogonal Q, W·x = (W·Qᵀ)·(Q·x). Rotated weights have no outliers left: each is a sum over
many, so that few levels fit them better. Q = H·D: D changes signs by a fixed pattern, H is made of
Hadamard matrices and needs about n·log n additions.

A width n is cut into equal blocks of the largest order m that divides n and that is a product of
powers of 2 and of Hadamard matrices by Paley's constructions (12, 20, 24, 28, 36 …). Where that
leaves blocks under 16, the width is cut into unlike powers of 2, the largest first.

Source: incoherence by Hadamard matrices, QuIP#, arXiv 2402.04396; online rotation, QuaRot, arXiv
2404.00456; R. Paley, On orthogonal matrices, 1933.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["block_orders", "hadamard", "rotate", "rotate_back"]

_LEAST_BLOCK: Final = 16
_LARGEST_PART: Final = 64  # a product of parts is applied part by part
_PALEY: Final = (12, 20, 24, 28, 36, 44, 48, 60)


def rotate(values: Tensor) -> Tensor:
    """Q·x for each row x.

    Rows of a weight matrix and the inputs it gets are rotated alike: their products stay.

    Shapes: [..., width] → the same

    Returns:
        A new tensor of the same dtype; computed in float32 at least.
    """
    return _apply(values, back=False)


def rotate_back(values: Tensor) -> Tensor:
    """Qᵀ·x for each row x: undoes `turn`. Shapes: [..., width] → the same."""
    return _apply(values, back=True)


@cache
def block_orders(width: int) -> tuple[int, ...]:
    """The orders of the Hadamard matrices along the diagonal of H; their sum is `width`."""
    order = next((m for m in range(width, 0, -1) if width % m == 0 and _parts(m)), 1)
    if order == width or order >= _LEAST_BLOCK:
        return (order,) * (width // order)
    found = []
    while width:
        found.append(1 << (width.bit_length() - 1))
        width -= found[-1]
    return tuple(found)


@cache
def hadamard(order: int) -> NDArray[np.float64]:
    """A matrix of ±1 with H·Hᵀ = order·1, for an order of at most 64 that has a construction.

    Of NumPy, as `_signs`: a tensor that is kept for the process would keep the modes of torch in
    which it was made (default device, inference mode, fake tensors).

    Shapes: → [order, order]

    Raises:
        KeyError: there is none here.
    """
    if order == 1:
        return np.ones((1, 1))
    if order & (order - 1) == 0:
        half = hadamard(order // 2)
        return np.block([[half, half], [half, -half]])
    if order not in _PALEY:
        raise KeyError(order)
    q = order - 1
    return _paley_one(q) if q % 4 == 3 and _is_prime(q) else _paley_two(order // 2 - 1)


def _apply(values: Tensor, *, back: bool) -> Tensor:
    width = values.shape[-1]
    kind = torch.promote_types(values.dtype, torch.float32)
    x = values.to(kind).reshape(-1, width)
    signs = torch.tensor(_signs(width), device=x.device, dtype=kind)
    if not back:
        x = x * signs
    orders = block_orders(width)
    if len(set(orders)) == 1:
        y = _product(x.reshape(-1, orders[0]), back=back).reshape(-1, width)
    else:
        parts = torch.split(x, list(orders), dim=1)
        y = torch.cat([_product(part, back=back) for part in parts], 1)
    if back:
        y = y * signs
    return y.reshape(values.shape).to(values.dtype)


def _product(x: Tensor, *, back: bool) -> Tensor:
    """(H₁ ⊗ … ⊗ Hₖ)·x / √m for each row. Shapes: [n, m] → [n, m]."""
    n, order = x.shape
    left, right = 1, order
    for part in _parts(order):
        right //= part
        h = torch.tensor(hadamard(part) / math.sqrt(part), device=x.device, dtype=x.dtype)
        y = (h.T if back else h) @ x.reshape(n * left, part, right)
        left, x = left * part, y
    return x.reshape(n, order)


@cache
def _parts(order: int) -> tuple[int, ...]:
    """Orders of known Hadamard matrices whose product is `order`; nothing where there are none."""
    if order & (order - 1) == 0:
        return _powers(order)
    for first in _PALEY:
        if order % first == 0:
            rest = order // first
            if rest & (rest - 1) == 0:
                return (first, *(_powers(rest) if rest > 1 else ()))
            if more := _parts(rest):
                return (first, *more)
    return ()


def _powers(order: int) -> tuple[int, ...]:
    found = []
    while order > _LARGEST_PART:
        found.append(_LARGEST_PART)
        order //= _LARGEST_PART
    return (*found, order)


@cache
def _signs(width: int) -> NDArray[np.float64]:
    """±1 for each place, the same for every layer of that width and for ever."""
    # The highest bit of i·⌊2³²/φ⌋ mod 2³² after one xorshift: no generator that may change.
    i = np.arange(1, width + 1, dtype=np.uint64)
    mixed = (i * np.uint64(2654435769)) % np.uint64(1 << 32)
    mixed = mixed ^ (mixed >> np.uint64(15))
    mixed = (mixed * np.uint64(2246822519)) % np.uint64(1 << 32)
    return 1.0 - 2.0 * ((mixed >> np.uint64(31)) & np.uint64(1)).astype(np.float64)


def _paley_one(q: int) -> NDArray[np.float64]:
    """Order q + 1 for a prime q with q mod 4 = 3."""
    core = _residues(q)
    found = np.eye(q + 1)
    found[0, 1:] += 1
    found[1:, 0] -= 1
    found[1:, 1:] += core
    return found


def _paley_two(q: int) -> NDArray[np.float64]:
    """Order 2·(q + 1) for a prime q with q mod 4 = 1."""
    c = np.zeros((q + 1, q + 1))
    c[0, 1:] = c[1:, 0] = 1
    c[1:, 1:] = _residues(q)
    one = np.array([[1.0, 1.0], [1.0, -1.0]])
    zero = np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.asarray(np.kron(c, one) + np.kron(np.eye(q + 1), zero))


def _residues(q: int) -> NDArray[np.float64]:
    """χ(i − j): 1 for squares modulo q, −1 for others, 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    values = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]
    return np.array([[values[(i - j) % q] for j in range(q)] for i in range(q)])


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, math.isqrt(q) + 1))
