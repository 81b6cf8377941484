"""A short probe of one stack: what its model is given, and the positions the stack then has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.errors import AnatomyError
from trilens.io.messages import reason
from trilens.models.forward_call import (
    config_numbers,
    forward_arguments,
    given_arguments,
    pass_options,
    probe_ids,
)
from trilens.models.source_target import Reading
from trilens.models.stacks import Stack, encoder_of, reads_tokens, source_name

__all__ = ["PROBE_TOKENS", "Probe", "probe_of", "probe_with"]

PROBE_TOKENS = 11
"""Tokens in the probe: odd and small, so that no other axis of a model is likely to equal it."""

_LENGTHS = (PROBE_TOKENS, 13, 17, 19, 23, 29, 31)
_FRAMES = (203, 1607, 16_007)
"""Lengths of made-up sound: encoders shorten it by up to some thousand times."""
_WIDTHS = re.compile(r"mel|feat|in_channels|input_dim|input_size")
_ENOUGH = 13
"""Positions of a source: more than the target's tokens, where an encoder can give them."""
_FEWEST = 3
_SMALL_IMAGE = 224


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model is given to show one of its stacks.

    Attributes:
        arguments: of the forward pass.
        seq: positions of the stack.
        source: positions of the encoder, for a stack that attends to them; None for another.
    """

    arguments: Mapping[str, Any]
    seq: int
    source: int | None = None


def probe_of(model: PreTrainedModel, stack: Stack, reading: Reading) -> Probe:
    """A probe of a stack.

    Args:
        model: what a pass of the stack calls.
        stack: the stack.
        reading: the tokens that it and its source read.

    Raises:
        AnatomyError: its encoder reads no tokens, and no made-up input runs through it.
    """
    if stack.run != "with source":
        if reads_tokens(model):
            seq = _length(model)
            return Probe(forward_arguments(model, probe_ids(model, reading.vocab, seq), None), seq)
        features, positions = _features(model)
        return Probe({**features, **pass_options(model)}, positions)
    encoder = encoder_of(model)
    if encoder is None:
        raise AnatomyError(f"{type(model).__name__} has no encoder any more: open it again")
    given: dict[str, Tensor]
    if reads_tokens(encoder):
        # A source longer than the target: attention has at least as many keys as queries.
        length = _length(model, reversed(_LENGTHS))
        given = {"input_ids": probe_ids(model, reading.source_vocab, length, seed=1)}
    else:
        given, length = _features(encoder)
    seq = _length(model, [n for n in _LENGTHS if n != length])
    target = probe_ids(model, reading.vocab, seq)
    arguments = {**given, "decoder_input_ids": target, **pass_options(model)}
    return Probe(arguments, seq, length)


def probe_with(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Probe:
    """A probe that a caller gives: inputs of the forward pass, checked."""
    ids = inputs.get("input_ids")
    seq = int((inputs["inputs_embeds"] if ids is None else ids).shape[1])
    return Probe(given_arguments(model, inputs), seq)


def _length(model: PreTrainedModel, lengths: Iterable[int] = _LENGTHS) -> int:
    """The first of some lengths that no axis of the model is likely to equal."""
    axes = {int(value) for value in config_numbers(model) if value == int(value)}
    given = list(lengths)
    return next((n for n in given if n not in axes), given[-1])


def _features(encoder: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Made-up input that runs through an encoder, and how many positions it makes of it."""
    name, error = source_name(encoder), ""
    found: tuple[dict[str, Tensor], int] | None = None
    weight = next(each for each in encoder.parameters() if each.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    for shape in _shapes(encoder):
        made = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        given = {name: made}
        try:
            with torch.no_grad():
                output = encoder(**given, **pass_options(encoder))
        # Which shapes an encoder takes is only known to itself.
        except Exception as cause:  # noqa: BLE001
            error = error or reason(cause)
            continue
        hidden = getattr(output, "last_hidden_state", output)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] < _FEWEST:
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


def _shapes(encoder: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that an encoder of sound may read: samples, or frames of features either way."""
    config = getattr(encoder, "config", None)
    if source_name(encoder) == "pixel_values":
        yield from _image_shapes(config)
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


def _image_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """One image of the size that the configuration names, and a small one."""
    size = getattr(config, "image_size", None)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", None) or 3
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        yield (1, channels, *sides)
    yield (1, channels, _SMALL_IMAGE, _SMALL_IMAGE)


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
    for name, value in vars(getattr(encoder, "config", None) or object()).items():
        if isinstance(value, int) and value > 1 and _WIDTHS.search(name) and value not in seen:
            seen.add(value)
            yield value
