"""Prompts of encoder–decoders: a source that the encoder reads, a target that the decoder reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import NoTokenizerError, PromptError, UsageError
from trilens.io.messages import listed, reason
from trilens.models.positions import max_positions_of
from trilens.models.stacks import Stack, encoder_of, reads_tokens, source_name
from trilens.models.tokens import Prompt, PromptLike, SourceTarget, read_prompt, vocab_size_of
from trilens.text.source import Source, frames, place_name

__all__ = [
    "ReadOptions",
    "Reading",
    "beginning",
    "features_prompt",
    "is_features",
    "read_features",
    "read_pair",
    "source_arguments",
    "start_ids",
]

_TARGET_IDS = "decoder_input_ids"


@dataclass(frozen=True, slots=True)
class Reading:
    """The tokens that a stack reads, and the encoder of one that has a source.

    Attributes:
        vocab: token ids from 0 to below this; 0 where no tokens are read.
        max_positions: the most of them; None for any number.
    """

    vocab: int
    max_positions: int | None
    source_vocab: int = 0
    max_source_positions: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, stack: Stack) -> Reading:
        """Read off a model and one of its stacks."""
        encoder = encoder_of(model)
        if not stack.has_source or encoder is None:
            vocab = vocab_size_of(model) if reads_tokens(model) else 0
            return cls(vocab, max_positions_of(model))
        decoder = model.get_submodule(stack.path)
        source = _vocab_of(encoder, model) if reads_tokens(encoder) else 0
        return cls(
            _vocab_of(decoder, model), max_positions_of(model), source, max_positions_of(encoder)
        )


def _vocab_of(part: Any, model: PreTrainedModel) -> int:
    own = hasattr(part, "get_input_embeddings")
    return vocab_size_of(part if own else model)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How prompts are read.

    Attributes:
        tokenizer: of the model, or None.
        add_special_tokens: let the tokenizer put its special tokens around a text.
        number: of the prompt among several, for messages.
    """

    tokenizer: Any
    add_special_tokens: bool = True
    number: int | None = None

    def read(self, prompt: PromptLike, vocab: int, max_positions: int | None) -> Prompt:
        """A prompt of tokens; `PromptError` as `read_prompt` says."""
        return read_prompt(
            prompt,
            tokenizer=self.tokenizer,
            vocab_size=vocab,
            max_positions=max_positions,
            add_special_tokens=self.add_special_tokens,
            number=self.number,
        )


def is_features(prompt: object) -> bool:
    """Whether these are a forward pass's tensors, with no token ids among them."""
    return isinstance(prompt, Mapping) and "input_ids" not in prompt and _tensors(prompt) != {}


def read_pair(
    pair: SourceTarget, model: PreTrainedModel, reading: Reading, how: ReadOptions
) -> Prompt:
    """Read a source and a target.

    Args:
        pair: the prompt.
        model: the encoder–decoder that is to read it.
        reading: the tokens of its two sides.
        how: tokenizer and options.

    Returns:
        The target as a prompt, with the arguments of a forward pass that reads both.

    Raises:
        PromptError: as `read_prompt`, of either side.
        UsageError: no target and no start token, or tensors that the forward pass does not take.
    """
    source, given = _read_source(pair.source, model, reading, how)
    target = pair.target
    if target is None:
        target = given.pop(_TARGET_IDS, None)
        target = beginning(model) if target is None else target
    elif isinstance(target, str):
        target = _shifted(target, model, how.tokenizer, how.add_special_tokens)
    prompt = how.read(target, reading.vocab, reading.max_positions)
    arguments = {**given, _TARGET_IDS: prompt.ids[None]}
    return replace(prompt, arguments=arguments, source=source)


def _read_source(
    given: PromptLike, model: PreTrainedModel, reading: Reading, how: ReadOptions
) -> tuple[Source | None, dict[str, Tensor]]:
    if is_features(given):
        return None, read_features(given, model)
    if not reading.source_vocab:
        raise UsageError(
            f"{type(model).__name__} reads no tokens but {source_name(model)}: give a mapping of "
            "tensors, such as its processor returns"
        )
    read = how.read(given, reading.source_vocab, reading.max_source_positions)
    return Source(read.strings, read.ids, read.text), {"input_ids": read.ids[None]}


def read_features(features: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a mapping, of which the model's forward takes each.

    Raises:
        UsageError: one that it does not take.
    """
    found = _tensors(features)
    known = inspect.signature(model.forward).parameters
    unknown = [name for name in found if name not in known]
    if unknown:
        raise UsageError(
            f"{type(model).__name__} takes no {listed(unknown)}: its forward pass takes "
            f"{listed(known, 12)}"
        )
    return found


def start_ids(model: PreTrainedModel) -> list[int]:
    """The token that a decoder begins with.

    Raises:
        UsageError: the model's configuration names none.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return [value]
    raise UsageError(
        f"{type(model).__name__} names no decoder_start_token_id: give target= the ids that its "
        "decoder is to read"
    )


def beginning(model: PreTrainedModel) -> list[int]:
    """What a decoder begins with: its start token, and the ids that its configuration forces next.

    Raises:
        UsageError: as `start_ids`.
    """
    ids = start_ids(model)
    for place, token in getattr(model.generation_config, "forced_decoder_ids", None) or ():
        # Where a language is to be told from the sound, no id is named.
        if place != len(ids) or token is None:
            break
        ids.append(int(token))
    return ids


def source_arguments(prompt: Prompt) -> dict[str, Any]:
    """Of what a forward pass is given for a source and a target, the source's."""
    return {name: x for name, x in (prompt.arguments or {}).items() if name != _TARGET_IDS}


def _shifted(text: str, model: Any, tokenizer: Any, add_special_tokens: bool) -> list[int]:
    """The ids that a decoder reads while it gives this text: one place to the right."""
    if tokenizer is None:
        raise NoTokenizerError(
            "target is text, and this model has no tokenizer: give token ids, or pass a tokenizer"
        )
    labels = _labels(text, tokenizer, add_special_tokens)
    start = start_ids(model)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if labels[:1] == start:
        return labels[:-1] if len(labels) > 1 and labels[-1] in special else labels
    if not labels or labels[-1] not in special:
        return start + labels
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return start + labels[:-1]
    return [int(i) for i in shift(labels=torch.tensor([labels]))[0]]


def _labels(text: str, tokenizer: Any, add_special_tokens: bool) -> list[int]:
    options = {"add_special_tokens": add_special_tokens, "truncation": False, "padding": False}
    try:
        # Some tokenizers write targets otherwise: another vocabulary, another language's mark.
        aside = "text_target" in inspect.signature(tokenizer.__call__).parameters
        found = tokenizer(text_target=text, **options) if aside else tokenizer(text, **options)
        return [int(i) for i in found["input_ids"]]
    except Exception as cause:
        raise PromptError(
            f"this tokenizer ({type(tokenizer).__name__}) fails on the target: {reason(cause)}; "
            "give token ids, or another tokenizer"
        ) from cause


def _tensors(prompt: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in prompt.items() if isinstance(value, Tensor)}


def features_prompt(arguments: Mapping[str, Tensor], positions: int) -> Prompt:
    """What a stack reads that is no tokens."""
    made = frames(positions, place_name(arguments))
    return Prompt(made.token_ids, made.tokens, None, arguments)
