"""From inputs of a model's forward to a prompt: checked, and its images' tokens named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from trilens.models.anatomy import Anatomy
from trilens.models.forward_call import inputs_arguments
from trilens.models.forward_inputs import ForwardInputs, fitting, read_inputs
from trilens.models.media import Reading, changed, find_media, without_places
from trilens.models.prompt_text import spelled
from trilens.models.tokens import Prompt
from trilens.taps.stack_input import stack_input

__all__ = ["prompt_of_inputs"]

_TRIED = ((0.0, 1.0), (0.75, 0.0))
"""Places, as parts of an image's rows and columns, that are changed to see which token follows."""


def prompt_of_inputs(
    inputs: object,
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokenizer: Any,
    *,
    vocab: int,
    max_positions: int | None,
) -> Prompt:
    """A prompt that is given to the forward as it stands; errors as of `read_inputs`.

    Which place of an image a token stands for is read off the tensors' shapes, and kept where the
    model bears it out: pixels in one place must move that token's vector more than any other's.
    Two short passes more, of the towers alone; memory as of the vision tower's own pass.
    """
    given = read_inputs(inputs, model, vocab=vocab, max_positions=max_positions)
    if not given.has_ids:
        strings = tuple(f"<embedding {i}>" for i in range(len(given.ids)))
        return Prompt(given.ids, strings, inputs=given)
    found = find_media(given.ids.tolist(), given.arguments, model.config)
    with fitting(model, given):
        readings = _borne_out(found, given, model, anatomy)
    strings, text = spelled(given.ids.tolist(), tokenizer, None, False)
    media = tuple(each for reading in readings for each in reading.media)
    labels: dict[int, str] = {}
    for each in media:
        labels |= each.labels()
    named = tuple(labels.get(position, string) for position, string in enumerate(strings))
    return Prompt(given.ids, named, text, given, media)


def _borne_out(
    readings: tuple[Reading, ...], given: ForwardInputs, model: PreTrainedModel, anatomy: Anatomy
) -> tuple[Reading, ...]:
    """The readings; those without their places whose places the model does not bear out."""
    if not any(reading.views for reading in readings):
        return tuple(map(without_places, readings))
    arguments = inputs_arguments(model, given, logits=False)
    plain = stack_input(model, anatomy, arguments)
    return tuple(
        reading
        if reading.views and _holds(reading, arguments, plain, model, anatomy)
        else without_places(reading)
        for reading in readings
    )


def _holds(
    reading: Reading,
    arguments: Mapping[str, Any],
    plain: Tensor,
    model: PreTrainedModel,
    anatomy: Anatomy,
) -> bool:
    """Whether noise in the place of a token moves this token most, in every image at once."""
    for parts in _TRIED:
        cells = [_cell(each.positions.shape, parts) for each in reading.media]
        pixels = changed(reading, arguments[reading.tensor], cells)
        vectors = stack_input(model, anatomy, {**arguments, reading.tensor: pixels})
        # PROMOTE: half-precision vectors differ by less than their squares can hold.
        moved = (vectors.float() - plain.float()).norm(dim=-1).cpu().numpy()
        for each, cell in zip(reading.media, cells, strict=True):
            most = int(np.argmax(moved[each.positions]))
            if most != int(np.ravel_multi_index(cell, each.positions.shape)):
                return False
    return True


def _cell(shape: tuple[int, ...], parts: tuple[float, float]) -> tuple[int, ...]:
    rows, cols = (round(part * (n - 1)) for part, n in zip(parts, shape[-2:], strict=True))
    return (*(n - 1 for n in shape[:-2]), rows, cols)
