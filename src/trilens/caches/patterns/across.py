"""Patterns whose keys are no tokens of the text: cut out of padded batches, and put end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilens.caches.patterns.protocol import DensePattern, Pattern
from trilens.caches.patterns.softmax.pattern import SoftmaxPattern

__all__ = ["join_across", "unpad_across"]


def unpad_across(pattern: Pattern, row: int, queries: int, keys: int) -> Pattern:
    """One row of a batch whose queries and keys were padded on the right, in tensors of its own.

    Args:
        pattern: of cross attention, over the batch.
        row: of the batch.
        queries: real ones of this row.
        keys: real ones of this row.
    """
    if not isinstance(pattern, SoftmaxPattern):
        own = pattern.dense()[row : row + 1, :, :queries, :keys]
        return DensePattern(own.clone(memory_format=torch.contiguous_format))
    held = pattern.tensors()
    cut = {
        "q": held["q"][row : row + 1, :, :queries],
        "k": held["k"][row : row + 1, :, :keys],
    }
    for name in ("mask", "bias"):
        if name in held:
            term = held[name]
            first = row if term.shape[0] > 1 else 0
            cut[name] = term[first : first + 1, :, :queries, :keys]
    mask = _plain(cut.pop("mask", None))
    own_tensors = {
        name: each.clone(memory_format=torch.contiguous_format) for name, each in cut.items()
    }
    if mask is not None:
        own_tensors["mask"] = mask.clone(memory_format=torch.contiguous_format)
    if "sinks" in held:
        own_tensors["sinks"] = held["sinks"]
    return pattern.rebuild(own_tensors, pattern.params())


def join_across(parts: Sequence[Pattern]) -> Pattern:
    """One pattern of queries that several passes made to the same keys, in their order.

    Args:
        parts: of one row each.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    alike = all(
        isinstance(each, SoftmaxPattern)
        and each.params() == first.params()
        and ("bias" in each.tensors()) == ("bias" in first.tensors())
        for each in parts
    )
    if not alike or not isinstance(first, SoftmaxPattern):
        return DensePattern(torch.cat([each.dense() for each in parts], dim=2))
    held = [each.tensors() for each in parts]
    tensors = {**held[0], "q": torch.cat([each["q"] for each in held], dim=2)}
    tensors.pop("mask", None)
    if "bias" in tensors:
        rows = [_rows(each["bias"], part.seq_q) for each, part in zip(held, parts, strict=True)]
        tensors["bias"] = torch.cat(rows, dim=2)
    mask = _masks([each.get("mask") for each in held], parts)
    if mask is not None:
        tensors["mask"] = mask
    return first.rebuild(tensors, first.params())


def _plain(mask: Tensor | None) -> Tensor | None:
    """The mask; None where it changes nothing."""
    if mask is None or bool((mask if mask.dtype == torch.bool else mask == 0).all()):
        return None
    return mask


def _rows(term: Tensor, seq_q: int) -> Tensor:
    return term.expand(*term.shape[:2], seq_q, term.shape[-1])


def _masks(masks: Sequence[Tensor | None], parts: Sequence[Pattern]) -> Tensor | None:
    """The masks of all passes, of a kind and end to end."""
    held = [_plain(mask) for mask in masks]
    given = [mask for mask in held if mask is not None]
    if not given:
        return None
    heads = max(mask.shape[1] for mask in given)
    weighed = [mask.dtype for mask in given if mask.dtype != torch.bool]
    dtype = weighed[0] if weighed else torch.bool
    rows = []
    for mask, part in zip(held, parts, strict=True):
        there = given[0].new_ones((1, 1, 1, part.seq_k), dtype=torch.bool) if mask is None else mask
        rows.append(_as(there, dtype).expand(1, heads, part.seq_q, part.seq_k))
    return torch.cat(rows, dim=2)


def _as(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as one that is added, where the others are."""
    if mask.dtype != torch.bool or dtype == torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
