"""What several prompts bring for a forward pass, as the rows of one batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trilens.models.tokens import Prompt

__all__ = ["PAIR", "TOKENS", "batch_key", "joined_arguments", "source_lengths", "varying"]

TOKENS, PAIR = "tokens", "pair of tokens"
"""Keys of prompts that may be padded: token ids alone, and token ids of a source and a target."""

_SOURCE_IDS, _TARGET_IDS = "input_ids", "decoder_input_ids"
_MASKS = {_SOURCE_IDS: "attention_mask", _TARGET_IDS: "decoder_attention_mask"}


def batch_key(prompt: Prompt) -> Hashable:
    """What prompts of one batch have in common; None for one that is alone in any batch.

    Rows of tokens are padded. Everything else that a forward pass is given, such as pixels or
    sound, has to be of one shape.
    """
    given = prompt.arguments
    if given is None:
        return TOKENS
    if given.keys() == {_SOURCE_IDS, _TARGET_IDS}:
        return PAIR
    parts: list[Hashable] = []
    for name, value in sorted(given.items()):
        if isinstance(value, Tensor):
            shape = () if _is_padded(name, given) else tuple(value.shape)
            parts.append((name, shape, value.dtype))
        elif isinstance(value, bool | int | float | str):
            parts.append((name, value))
        else:
            return None
    return tuple(parts)


def varying(prompts: Sequence[Prompt]) -> frozenset[str]:
    """The arguments in which prompts that have their key in common differ."""
    first, *others = [prompt.arguments or {} for prompt in prompts]
    return frozenset(
        name
        for name, value in first.items()
        if isinstance(value, Tensor)
        and not all(torch.equal(value, other[name]) for other in others)
    )


def joined_arguments(
    prompts: Sequence[Prompt], pad: int, source_pad: int
) -> tuple[dict[str, Any], int]:
    """The arguments of one pass over prompts that have their key in common.

    Args:
        prompts: each with arguments of its own.
        pad: an id to pad with what the stack reads.
        source_pad: an id to pad a source with.

    Returns:
        The arguments, with masks where a row is padded; and the tokens of the longest prompt.
    """
    first = prompts[0].arguments or {}
    found: dict[str, Any] = {}
    for name, value in first.items():
        values = [(prompt.arguments or {})[name] for prompt in prompts]
        if not isinstance(value, Tensor):
            found[name] = value
        elif _is_padded(name, first):
            rows, mask = _padded(values, source_pad if name == _SOURCE_IDS else pad)
            found[name] = rows
            if not bool(mask.all()):
                found[_MASKS[name]] = mask
        else:
            found[name] = torch.cat(values)
    return found, max(len(prompt.ids) for prompt in prompts)


def source_lengths(prompts: Sequence[Prompt], positions: int | None) -> list[int] | None:
    """How many of the encoder's positions are each prompt's own.

    Args:
        prompts: of one batch.
        positions: of the encoder, padding among them; None where there are none.

    Returns:
        A number for each prompt; None where padding cannot be told from the rest.
    """
    if positions is None:
        return [0] * len(prompts)
    tokens = [len(prompt.source.tokens) for prompt in prompts if prompt.source is not None]
    if len(tokens) == len(prompts) and max(tokens) == positions:
        return tokens
    return [positions] * len(prompts) if len(set(tokens)) <= 1 else None


def _is_padded(name: str, given: Mapping[str, Any]) -> bool:
    """Whether rows of this argument may have several lengths: a source's and a target's tokens."""
    return name in _MASKS and _TARGET_IDS in given


def _padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(row.shape[-1] for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : row.shape[-1]] = row[0]
        mask[place, : row.shape[-1]] = 1
    return ids, mask
