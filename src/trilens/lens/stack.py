"""One site of many prompts as one tensor: what a probe is fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, SupportsIndex

import torch
from torch import Tensor

from trilens.axes import SITES
from trilens.caches.activation import FullActivationCache
from trilens.caches.indices import check_index
from trilens.caches.sites import plain_name
from trilens.errors import ShapeError, UsageError, ValueRangeError
from trilens.io.messages import clip
from trilens.lens.capture import Capture
from trilens.models.encoded import each_prompt
from trilens.models.tokens import PromptLike
from trilens.numbers import whole_number
from trilens.progress import Progress

__all__ = ["Captures", "Where", "stack"]

Where = SupportsIndex | Literal["last", "mean"]
"""Which token of each prompt: a position, the last, or the mean over all."""


class Captures(Protocol):
    """What gives captures: a `Lens`."""

    def capture_many(self, *args: Any, **options: Any) -> Iterator[Capture]:
        """One capture per prompt."""


def stack(
    lens: Captures,
    prompts: Iterable[PromptLike],
    *,
    site: str = "resid_post",
    layers: Iterable[SupportsIndex] | None = None,
    position: Where = -1,
    batch_size: SupportsIndex = 8,
    progress: Progress | None = None,
) -> Tensor:
    """One site of many prompts: [prompt, layer, …], the rest as the site's axes after the tokens.

    Args:
        lens: what runs the prompts, in batches.
        prompts: as `capture_many` takes them.
        site: a name of `axes.SITES` or an alias; its first axis must be the tokens.
        layers: layer numbers, in the result ascending; all that have the site where not given. A
            site that the model has once gives a layer axis of 1.
        position: of one token, negative from each prompt's own end; "last"; or "mean" over the
            prompt's tokens.
        batch_size: prompts per forward pass.
        progress: called after each pass.

    Returns:
        A tensor of its own, in the site's dtype and on its device; each value is copied once.

    Raises:
        UsageError: no prompts, a site whose first axis is not the tokens, or no such position.
        OutOfRangeError: a layer, or a position that a prompt is too short for.
        ShapeError: layers whose values differ in shape.
    """
    name = plain_name(site)
    if not SITES[name].axes.startswith("[seq, "):
        raise UsageError(
            f"site {name!r} has axes {SITES[name].axes}: only sites with one value per token, "
            "[seq, …], can be stacked"
        )
    where = _where(position)
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise UsageError(f"prompts is one {type(prompts).__name__}: give a list of prompts")
    given = list(each_prompt(prompts))
    if not given:
        raise ValueRangeError("prompts is empty: give at least one")
    # What a capture has anyway of the last tokens costs nothing more.
    residual = None if name != "resid_post" else "last" if where == -1 else "all"
    options: dict[str, Any] = {} if residual else {"sites": [name]}
    captures = lens.capture_many(
        given,
        batch_size=batch_size,
        residual=residual,
        logits=None,
        layers=None if layers is None else tuple(layers),
        progress=progress,
        **options,
    )
    out = torch.empty(0)
    for number, capture in enumerate(captures):
        tensors = _tensors(capture, name)
        found = [_at(tensor, where, len(capture.tokens), number) for tensor in tensors]
        if number == 0:
            out = tensors[0].new_empty((len(given), len(found), *found[0].shape))
        for row, value in zip(out[number], found, strict=True):
            if row.shape != value.shape:
                raise ShapeError(
                    f"{name} is {list(row.shape)} in one layer and {list(value.shape)} in another: "
                    "stack layers of one shape"
                )
            row.copy_(value)
    return out


def _where(position: object) -> int | str:
    if isinstance(position, str):
        if position not in ("last", "mean"):
            raise UsageError(f"position {clip(position)} is unknown: a number, 'last' or 'mean'")
        return -1 if position == "last" else position
    return whole_number(position, "position")


def _tensors(capture: Capture, name: str) -> Sequence[Tensor]:
    """The site of each layer: [seq, …], or […] of the last token where only that was captured."""
    if name == "resid_post":
        cache = capture.residual
        found = [cache[layer] for layer in cache.layers]
        return found if isinstance(cache, FullActivationCache) else [t[None] for t in found]
    return [capture.sites[name, layer] for layer in capture.sites.layers(name) or (None,)]


def _at(tensor: Tensor, where: int | str, seq: int, number: int) -> Tensor:
    if isinstance(where, str):
        # PROMOTE: a mean over thousands of tokens in half precision has few digits left.
        return tensor.mean(0, dtype=torch.promote_types(tensor.dtype, torch.float32))
    owner = f"prompt {number} of {seq} tokens"
    at = check_index(where, seq, "position", owner, negative=True)
    # Of the last token alone there is one row.
    return tensor[at - seq]
