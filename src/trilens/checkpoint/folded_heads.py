"""Rotations of attention's values, folded into the layers that make and read them.

An attention head mixes tokens, never the channels of its values: softmax(q·k)·v·Rᵀ is the mixture,
rotated. So a rotation R of a head's channels moves into the rows of the layer that makes values and
the columns of the layer that reads what heads give, and nothing is left to compute.

Which rows are a head's values is seen on a probe: the first token attends to itself alone, so that
what its heads give are the values themselves.

Source: SpinQuant, arXiv 2405.16406 (R2); QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilens.ternary.rotation import rotate

__all__ = ["ValueHeads", "find_value_heads", "fold_heads"]

_TOLERANCE = 1e-5  # of the largest value


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """Where the values of one attention are made and read.

    Attributes:
        maker: The layer whose rows are values, and perhaps queries and keys.
        reader: The layer whose columns are what all the heads give.
        width: Channels of a head.
        rows: Where the rows of each head of values begin.
    """

    maker: str
    reader: str
    width: int
    rows: tuple[int, ...]


def find_value_heads(
    calls: Mapping[str, tuple[Tensor, Tensor]],
    makers: Iterable[str],
    readers: Iterable[str],
    blocks: Iterable[str],
    n_heads: int,
) -> tuple[ValueHeads, ...]:
    """The attentions whose first token's outputs are values that a layer made.

    Args:
        calls: what each linear layer got and gave, [1, tokens, channels].
        makers: layers that read the residual stream.
        readers: layers that add to it.
        blocks: paths of the model's blocks.
        n_heads: heads of an attention, as the configuration has them.
    """
    found = []
    for block in blocks:
        inside = [path for path in makers if path.startswith(f"{block}.")]
        for reader in readers:
            given = calls[reader][0]
            if reader.startswith(f"{block}.") and given.shape[-1] % n_heads == 0:
                width = given.shape[-1] // n_heads
                heads = given.reshape(-1, n_heads, width)[0]
                found += [
                    ValueHeads(maker, reader, width, rows)
                    for maker in inside
                    if (rows := _rows(heads, calls[maker][1])) is not None
                ][:1]
    return tuple(found)


def fold_heads(model: nn.Module, heads: ValueHeads) -> None:
    """Rotate the values of one attention, and undo it where they are read."""
    maker: Any = model.get_submodule(heads.maker)
    reader: Any = model.get_submodule(heads.reader)
    for row in heads.rows:
        rows = slice(row, row + heads.width)
        maker.weight[rows] = rotate(maker.weight[rows].double().T).T.to(maker.weight.dtype)
        if maker.bias is not None:
            maker.bias[rows] = rotate(maker.bias[rows].double()[None])[0].to(maker.bias.dtype)
    by_head = reader.weight.double().unflatten(1, (-1, heads.width))
    reader.weight.copy_(rotate(by_head).flatten(1))


def _rows(heads: Tensor, made: Tensor) -> tuple[int, ...] | None:
    """Where each head of values begins in what a layer made; None where it is none or unclear.

    Shapes: heads [heads, width]; made [1, tokens, channels]
    """
    width = heads.shape[-1]
    first = made.reshape(-1, made.shape[-1])[0]
    if first.numel() % width or width < 2:
        return None
    parts = first.reshape(-1, width)
    gaps = torch.stack([(parts - head).abs().amax(-1) for head in heads])
    same = gaps <= _TOLERANCE * heads.abs().max()
    if not bool((same.sum(-1) == 1).all()):
        return None
    return tuple(sorted({width * int(part) for part in same.int().argmax(-1)}))
