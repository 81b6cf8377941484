"""From inputs of a model's forward to a prompt: checked, and its images' tokens named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import PromptError, UsageError
from trilens.models.anatomy import Anatomy
from trilens.models.forward_inputs import fitting, read_inputs
from trilens.models.media import Reading, changed, find_media, without_places
from trilens.models.prompt_text import spelled
from trilens.models.tokens import Prompt, SourceTarget
from trilens.taps.positions import vectors_of

__all__ = ["each_inputs", "numbered", "prompt_of_inputs", "split_target", "with_target"]

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
    given, held = read_inputs(inputs, model, vocab=vocab, max_positions=max_positions)
    ids = held.tolist()
    if "input_ids" not in given:
        vectors = tuple(f"<embedding {i}>" for i in range(len(ids)))
        return Prompt(held, vectors, arguments=given)
    found = find_media(ids, given, model.config)
    with fitting(model, given):
        readings = _borne_out(found, given, model, anatomy)
    strings, text = spelled(ids, tokenizer, None, False)
    media = tuple(each for reading in readings for each in reading.media)
    labels: dict[int, str] = {}
    for each in media:
        labels |= each.labels()
    named = tuple(labels.get(position, string) for position, string in enumerate(strings))
    return Prompt(held, named, text, given, media=media)


def each_inputs(prompts: object, inputs: object) -> Iterable[Any] | None:
    """Several inputs of a forward, None where prompts are given.

    Raises:
        UsageError: both or neither are given, or what is no list of mappings.
    """
    if (prompts is None) == (inputs is None):
        raise UsageError(
            "both prompts and inputs are given: the inputs hold the prompts' token ids"
            if inputs is not None
            else "nothing is given to read: prompts, or inputs=[processor(…), …]"
        )
    if inputs is None:
        return None
    if isinstance(inputs, Mapping | str) or not isinstance(inputs, Iterable):
        raise UsageError(
            f"inputs is one {type(inputs).__name__}: give a list with a mapping for each prompt, "
            "or use capture"
        )
    return inputs


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Say which of several inputs it is that cannot be read."""
    try:
        yield
    except (PromptError, UsageError) as error:
        words = str(error)
        rest = words.removeprefix("inputs")
        title = f"inputs[{number}]{'' if rest != words else ': '}"
        raise type(error)(f"{title}{rest}") from error


def with_target(prompt: Any, inputs: Any, target: Any) -> tuple[Any, Any]:
    """A prompt and inputs, of which one is None; what a decoder reads goes with its source."""
    if target is None:
        return prompt, inputs
    return (
        (SourceTarget(inputs, target), None)
        if prompt is None
        else (
            SourceTarget(prompt, target),
            inputs,
        )
    )


def split_target(inputs: object) -> tuple[Any, Any]:
    """Of an encoder–decoder's inputs, what its encoder reads and what its decoder reads."""
    if not isinstance(inputs, Mapping):
        return inputs, None
    source = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return source, inputs.get("decoder_input_ids")


def _borne_out(
    readings: tuple[Reading, ...],
    given: Mapping[str, Any],
    model: PreTrainedModel,
    anatomy: Anatomy,
) -> tuple[Reading, ...]:
    """The readings; those without their places whose places the model does not bear out."""
    if not any(reading.views for reading in readings):
        return tuple(map(without_places, readings))
    plain = vectors_of(model, anatomy, given)
    return tuple(
        reading
        if reading.views and _holds(reading, given, plain, model, anatomy)
        else without_places(reading)
        for reading in readings
    )


def _holds(
    reading: Reading,
    given: Mapping[str, Any],
    plain: Tensor,
    model: PreTrainedModel,
    anatomy: Anatomy,
) -> bool:
    """Whether noise in the place of a token moves this token most, in every image at once."""
    for parts in _TRIED:
        cells = [_cell(each.positions.shape, parts) for each in reading.media]
        pixels = changed(reading, given[reading.tensor], cells)
        vectors = vectors_of(model, anatomy, {**given, reading.tensor: pixels})
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
