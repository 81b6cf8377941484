"""A short probe of one stack: what its model is given, and the positions the stack then has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import AnatomyError
from trilens.models.forward_call import (
    config_numbers,
    forward_arguments,
    given_arguments,
    pass_options,
    probe_ids,
)
from trilens.models.made_up import made_up_features
from trilens.models.source_target import Reading
from trilens.models.stacks import Stack, encoder_of, reads_tokens

__all__ = ["PROBE_TOKENS", "Probe", "probe_of", "probe_with"]

PROBE_TOKENS = 11
"""Tokens in the probe: odd and small, so that no other axis of a model is likely to equal it."""

_LENGTHS = (PROBE_TOKENS, 13, 17, 19, 23, 29, 31)


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
        features, positions = made_up_features(model)
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
        given, length = made_up_features(encoder)
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
