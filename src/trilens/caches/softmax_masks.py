"""Masks of a pattern: the plainest form that says the same, and their cut for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["SharedMasks", "plain_mask", "tensor_identity"]


def tensor_identity(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for two tensors that show the same memory in the same way.

    It says so only while a tensor of that memory is alive: keep one beside the key.
    """
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        str(tensor.device),
    )


def plain_mask(
    mask: Tensor | None, *, seq_q: int, seq_k: int, causal: bool, query_offset: int = 0
) -> tuple[Tensor | None, bool]:
    """The plainest (mask, causal) with the same meaning.

    An additive mask of nothing but zeros and masked values becomes bool; a mask that hides
    nothing, or nothing more than causality does, goes away.

    Args:
        mask: [1 or heads, 1 or seq_q, seq_k] or with a batch axis before it.
        seq_q: query positions.
        seq_k: key positions.
        causal: whether causality holds besides the mask.
        query_offset: keys before the first query.

    Returns:
        The mask, its own tensor where it could not be made plainer, and causal.
    """
    if mask is None:
        return None, causal
    if mask.dtype != torch.bool:
        open_ = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask[open_] != 0).any()):
            return mask, causal
        mask = open_
    if bool(mask.all()):
        return None, causal
    past = torch.ones(seq_q, seq_k, dtype=torch.bool, device=mask.device).tril_(query_offset)
    seen = mask & past if causal else mask
    if bool((seen == past).all()):
        return None, True
    return mask, causal


@dataclass(slots=True)
class SharedMasks:
    """Remembers cut masks while a batch is unpadded, so that layers go on sharing one tensor.

    Make one per batch, pass it to every `unpad`, then drop it: it keeps the batch's masks alive.
    """

    _cuts: dict[tuple[object, ...], tuple[Tensor, Tensor | None, bool]] = field(
        default_factory=dict
    )

    def cut_mask(
        self, mask: Tensor | None, row: int, n: int, *, causal: bool
    ) -> tuple[Tensor | None, bool]:
        """The mask of the first n tokens of a batch row, owned and plain; and causal.

        Shapes
            mask [1 or batch, 1 or heads, 1 or seq, seq] → [1, 1 or heads, 1 or n, n].
        """
        if mask is None:
            return None, causal
        key = ("mask", causal, row, n, *tensor_identity(mask))
        if key not in self._cuts:
            cut = _cut(mask, row, n)
            plain, still_causal = plain_mask(cut, seq_q=n, seq_k=n, causal=causal)
            owned = plain.clone() if plain is cut else plain
            self._cuts[key] = (mask, owned, still_causal)
        return self._cuts[key][1:]

    def cut_bias(self, bias: Tensor | None, row: int, n: int) -> Tensor | None:
        """The bias of the first n tokens of a batch row, owned."""
        if bias is None:
            return None
        key = ("bias", row, n, *tensor_identity(bias))
        if key not in self._cuts:
            self._cuts[key] = (bias, _cut(bias, row, n).clone(), False)
        return self._cuts[key][1]


def _cut(term: Tensor, row: int, n: int) -> Tensor:
    first = row if term.shape[0] > 1 else 0
    return term[first : first + 1, :, :n, :n]
