"""Made-up images and sound that run through an encoder: shapes that it may read, tried in turn."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trilens.errors import AnatomyError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.models.forward_call import pass_options
from trilens.models.stacks import source_name

__all__ = ["made_up_features"]

_FRAMES = (203, 1607, 16_007)
"""Lengths of made-up sound: encoders shorten it by up to some thousand times."""
_WIDTHS = re.compile(r"mel|feat|in_channels|input_dim|input_size")
_ENOUGH = 13
"""Positions of a source: more than the target's tokens, where an encoder can give them."""
_FEWEST = 3
_SMALL_IMAGE = 224
_SIDE = 4
"""Patches along each side of an image that is given as patches."""


def made_up_features(encoder: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Made-up input that runs through an encoder, and how many positions it makes of it.

    Raises:
        AnatomyError: nothing that was tried runs.
    """
    name, error = source_name(encoder), ""
    found: tuple[dict[str, Tensor], int] | None = None
    for given in _inputs(encoder):
        try:
            with torch.no_grad():
                output = encoder(**given, **pass_options(encoder))
        # Which shapes an encoder takes is only known to itself.
        except Exception as cause:
            if is_short_of_memory(cause):
                raise
            error = error or reason(cause)
            continue
        hidden = getattr(output, "last_hidden_state", output)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] < _FEWEST:
            shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            error = error or f"it gives {shape}, not a vector for each position"
            continue
        if found is None or hidden.shape[1] > found[1]:
            found = given, int(hidden.shape[1])
        if found[1] >= _ENOUGH:
            return found
    if found is not None:
        return found
    raise AnatomyError(
        f"the encoder {type(encoder).__name__} reads {name}, and no made-up input of the shapes "
        f"that its configuration speaks of runs through it ({error})"
    )


def _inputs(encoder: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What an encoder may be given: its source, and masks, grids and sizes that go with it."""
    name = source_name(encoder)
    taken = inspect.signature(encoder.forward).parameters
    weight = next(each for each in encoder.parameters() if each.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    for shape in _shapes(encoder):
        source = made(shape)
        masks = [each for each in taken if each.endswith("features_mask")]
        # Frames are the longer axis of what is tried.
        ones = torch.ones(1, max(shape[1:]), dtype=torch.long, device=weight.device)
        yield {name: source, **dict.fromkeys(masks, ones)}
    if name == "pixel_values":
        side = torch.tensor([[_SIDE, _SIDE]], device=weight.device)
        every = torch.ones(1, _SIDE * _SIDE, dtype=torch.long, device=weight.device)
        beside = {"spatial_shapes": side, "pixel_attention_mask": every,
                  "pixel_position_ids": _places(weight.device)}  # fmt: skip
        extra = {key: value for key, value in beside.items() if key in taken}
        for width in _patch_widths(encoder) if extra else ():
            yield {name: made((1, _SIDE * _SIDE, width)), **extra}
    if name == "flattened_patches":
        for width in _patch_widths(encoder):
            # Row and column, from 1, stand before the pixels of a patch.
            places = 1 + _places(weight.device).to(weight.dtype)
            yield {name: torch.cat([places, made((1, _SIDE * _SIDE, width))], dim=-1)}


def _places(device: torch.device) -> Tensor:
    """Row and column of each patch: [1, patches, 2]."""
    line = torch.arange(_SIDE, device=device)
    return torch.cartesian_prod(line, line)[None]


def _patch_widths(encoder: nn.Module) -> Iterator[int]:
    """How many numbers a patch may have: what the first weight that reads pixels takes."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            yield module.in_features
            return
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            yield module.weight[0].numel()
            return


def _shapes(encoder: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that an encoder of sound may read: samples, or frames of features either way."""
    config = getattr(encoder, "config", None)
    if source_name(encoder) == "pixel_values":
        yield from _image_shapes(encoder)
        return
    widths, lengths = list(_widths(encoder)), list(_FRAMES)
    # Some encoders read a stretch of sound of one length only.
    most = getattr(config, "max_source_positions", None)
    if isinstance(most, int):
        lengths = [2 * most, *lengths]
    for frames in lengths:
        for width in widths:
            yield (1, width, frames)
            yield (1, frames, width)
    for samples in lengths:
        yield (1, samples)
    for samples in lengths:
        yield (1, 1, samples)


def _image_shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """One image of each size that the configuration or a part names, and a small one."""
    config = getattr(module, "config", None)
    channels = getattr(config, "num_channels", None) or 3
    named = [getattr(each, "image_size", None) for each in (config, *module.modules())]
    sizes = [tuple(size) if isinstance(size, list | tuple) else (size, size) for size in named]
    sides = [size for size in sizes if len(size) == 2 and all(isinstance(n, int) for n in size)]
    for height, width in dict.fromkeys([*sides, (_SMALL_IMAGE, _SMALL_IMAGE)]):
        yield (1, channels, height, width)


def _widths(encoder: nn.Module) -> Iterator[int]:
    """How wide a frame may be: by the first weight it meets, and by the configuration."""
    seen = set[int]()
    for module in encoder.modules():
        width = {nn.Conv1d: "in_channels", nn.Linear: "in_features"}.get(type(module))
        if width is not None:
            first = int(getattr(module, width))
            if first > 1:
                seen.add(first)
                yield first
            break
    config: Any = getattr(encoder, "config", None)
    for name, value in ({} if config is None else vars(config)).items():
        if isinstance(value, int) and value > 1 and _WIDTHS.search(name) and value not in seen:
            seen.add(value)
            yield value
