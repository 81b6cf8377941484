"""Masks of a pattern: the plainest form that says the same, and their cut for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["SharedMasks", "implied_causality", "plain_mask", "tensor_identity", "visible"]

# Mask bytes looked at in one go.
_SCAN_BYTES = 4 * 2**20


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


def visible(term: Tensor) -> Tensor:
    """Where a mask or bias lets a query see a key: bool, of the term's shape."""
    return term if term.dtype == torch.bool else term > torch.finfo(term.dtype).min / 2


def implied_causality(
    mask: Tensor, *, seq_q: int, seq_k: int, causal: bool, query_offset: int = 0
) -> bool | None:
    """The value of `causal` that alone says everything the mask and `causal` say, if there is one.

    Looked up in blocks of rows, and given up at the first that says more.

    Args:
        mask: [.., 1 or seq_q, seq_k], bool or additive.
        seq_q: query positions.
        seq_k: key positions.
        causal: whether causality holds besides the mask.
        query_offset: keys before the first query.

    Returns:
        False: nothing is hidden; True: what comes later is hidden and nothing else; None: the mask
        has to stay.
    """
    if mask.shape[-2] == 1 and bool(_open(mask).all()):
        return causal
    rows = mask.expand(*mask.shape[:-2], seq_q, seq_k).flatten(0, -3)
    keys = torch.arange(seq_k, device=mask.device)
    hides_nothing, hides_later = not causal, True
    step = max(1, _SCAN_BYTES // (rows.shape[0] * seq_k * mask.element_size()))
    for start in range(0, seq_q, step):
        block = rows[:, start : start + step]
        free = _open(block)
        queries = torch.arange(start, start + block.shape[1], device=mask.device) + query_offset
        past = keys <= queries[:, None]
        if causal:
            hides_later = bool((free | ~past).all())
        else:
            hides_nothing = hides_nothing and bool(free.all())
            hides_later = hides_later and bool(((free == past) & (visible(block) == past)).all())
        if not (hides_nothing or hides_later):
            return None
    return not hides_nothing


def plain_mask(
    mask: Tensor | None, *, seq_q: int, seq_k: int, causal: bool, query_offset: int = 0
) -> tuple[Tensor | None, bool]:
    """The plainest (mask, causal) with the same meaning.

    An additive mask of nothing but zeros and masked values becomes bool; a mask that hides
    nothing, or nothing more than causality does, goes away.

    Arguments are those of `implied_causality`.

    Returns:
        The mask, its own tensor where it could not be made plainer, and causal.
    """
    if mask is None:
        return None, causal
    enough = implied_causality(
        mask, seq_q=seq_q, seq_k=seq_k, causal=causal, query_offset=query_offset
    )
    if enough is not None:
        return None, enough
    seen = visible(mask)
    weighs = mask.dtype != torch.bool and bool((seen & (mask != 0)).any())
    return (mask if weighs else seen), causal


def _open(mask: Tensor) -> Tensor:
    """Where the mask changes nothing."""
    return mask if mask.dtype == torch.bool else mask == 0


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
