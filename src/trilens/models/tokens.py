"""From a caller's prompt to token ids, within what the model reads."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from tokenizers import Encoding

from trilens.errors import (
    DtypeError,
    EmptyPromptError,
    NoTokenizerError,
    PromptError,
    PromptTooLongError,
    ShapeError,
    TokenIdError,
    UsageError,
)
from trilens.io.messages import clip, reason
from trilens.models.encoded import (
    ids_of_encoding,
    ids_of_messages,
    is_messages,
    warn_doubled_bos,
)
from trilens.models.positions import text_settings
from trilens.models.prompt_text import spelled
from trilens.models.tokenizers import usable_tokenizer
from trilens.text.media import Media
from trilens.text.prompt_text import PromptText
from trilens.text.source import Source

__all__ = [
    "Prompt",
    "PromptLike",
    "SourceTarget",
    "pad_id_for",
    "read_prompt",
    "token_ids_of",
    "vocab_size_of",
]


@dataclass(frozen=True, slots=True, eq=False)
class SourceTarget:
    """One prompt of an encoder–decoder.

    Attributes:
        source: what the encoder reads: as any prompt, or a mapping of the tensors that the forward
            pass takes, such as a processor's `input_features`.
        target: what the decoder reads. A text is what the decoder is to give: it reads that text
            shifted right, after its start token, as in training. Ids are read as they are. Where
            it is not given, the decoder reads what it begins with: its start token, and ids that
            the generation config forces after it.
    """

    source: PromptLike
    target: PromptLike | None = None


PromptLike = (
    str
    | Sequence[int]
    | Sequence[Mapping[str, Any]]
    | Mapping[str, Any]
    | Encoding
    | torch.Tensor
    | np.ndarray[Any, Any]
    | SourceTarget
)
"""What a caller may give as one prompt."""

_ONE_ROW = "give one prompt, or read several with capture_many"


# Compared by identity: a tensor has no truth value, so field-wise equality could not work.
@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt, as the model reads it.

    Shapes:
        ids: [seq] int64, on the CPU
        strings: seq of them
        text: which characters each token covers; None without a tokenizer
        arguments: what the forward pass is given, where that is not the ids alone
        source: what the encoder reads, where it is known before the pass
        media: which tokens stand for images, videos and audio
    """

    ids: torch.Tensor
    strings: tuple[str, ...]
    text: PromptText | None = None
    arguments: Mapping[str, Any] | None = None
    source: Source | None = None
    media: tuple[Media, ...] = ()


def read_prompt(
    prompt: PromptLike,
    *,
    tokenizer: Any,
    vocab_size: int,
    max_positions: int | None,
    add_special_tokens: bool = True,
    number: int | None = None,
) -> Prompt:
    """Read one prompt.

    Args:
        prompt: text, a sequence of ids, or an integer tensor or array [seq] or [1, seq]; what a
            tokenizer returned for one prompt (padding is left out); or chat messages, each with
            role and content, as the tokenizer's template writes them. Ids are taken as they are,
            nothing is added to them.
        tokenizer: of the model; None when there is none, then only ids can be read.
        vocab_size: ids from 0 to below this are allowed.
        max_positions: the most tokens a prompt may have; None for any number.
        add_special_tokens: let the tokenizer put its special tokens around a text.
        number: of the prompt among several, for messages.

    Raises:
        EmptyPromptError: no text, or no token.
        NoTokenizerError: a text or a chat, and no tokenizer.
        NoChatTemplateError: a chat, and a tokenizer without a template.
        DtypeError: ids that are not integers.
        ShapeError: more than one row.
        TokenIdError: ids outside the vocabulary.
        PromptTooLongError: more tokens than positions.
        PromptError: text that is no valid Unicode.
        UsageError: something that is no prompt at all.
    """
    try:
        return _read(
            prompt, usable_tokenizer(tokenizer), vocab_size, max_positions, add_special_tokens
        )
    except (PromptError, UsageError) as error:
        if number is None:
            raise
        words = str(error)
        rest = words.removeprefix("prompt")
        title = f"prompt {number}{'' if rest != words else ':'} "
        raise type(error)(f"{title}{rest.lstrip()}") from error


def token_ids_of(
    prompt: PromptLike, *, tokenizer: Any, vocab_size: int, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a prompt of any length, as `read_prompt` reads them, and no more.

    Raises:
        PromptError, UsageError: as `read_prompt`.
    """
    return _token_ids(prompt, usable_tokenizer(tokenizer), vocab_size, add_special_tokens)


def _read(
    prompt: PromptLike,
    tokenizer: Any,
    vocab_size: int,
    max_positions: int | None,
    add_special_tokens: bool,
) -> Prompt:
    written = prompt if isinstance(prompt, str) else None
    ids = _token_ids(prompt, tokenizer, vocab_size, add_special_tokens)
    if max_positions is not None and len(ids) > max_positions:
        raise PromptTooLongError(
            f"prompt has {len(ids)} tokens, this model has {max_positions} positions: "
            f"shorten it to at most {max_positions} tokens"
        )
    strings, text = spelled(ids, tokenizer, written, add_special_tokens)
    return Prompt(torch.tensor(ids, dtype=torch.int64), strings, text)


def _token_ids(
    prompt: PromptLike, tokenizer: Any, vocab_size: int, add_special_tokens: bool
) -> list[int]:
    encoded = isinstance(prompt, Mapping | Encoding)
    from_text = isinstance(prompt, str) or is_messages(prompt)
    if isinstance(prompt, Mapping | Encoding):
        prompt = ids_of_encoding(prompt)
    if isinstance(prompt, str):
        ids = _encode(prompt, tokenizer, add_special_tokens)
    elif is_messages(prompt):
        ids = ids_of_messages(prompt, tokenizer)
    elif isinstance(prompt, torch.Tensor | np.ndarray):
        ids = _ids_of_array(prompt)
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
        ids = _ids_of_sequence(prompt)
    else:
        raise UsageError(
            f"prompt is a {type(prompt).__name__}: give text, a list of token ids, an integer "
            "tensor [seq] or [1, seq], what a tokenizer returned, or chat messages"
        )
    if not ids:
        raise EmptyPromptError("prompt is empty: give at least one token")
    _check_range(ids, vocab_size, from_text=from_text)
    if from_text or encoded:
        warn_doubled_bos(ids, tokenizer)
    return ids


def _encode(text: str, tokenizer: Any, add_special_tokens: bool) -> list[int]:
    if tokenizer is None:
        raise NoTokenizerError(
            "prompt is text, and this model has no tokenizer: give token ids, or pass a tokenizer"
        )
    if not text:
        raise EmptyPromptError("prompt is empty: give at least one character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise PromptError(
            f"prompt is not valid Unicode: character {cause.start} is the lone surrogate "
            f"U+{ord(text[cause.start]):04X}; replace it"
        ) from cause
    # Settings stored with a tokenizer (truncation, padding) would change the prompt without a word.
    try:
        encoded = tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return [int(i) for i in encoded["input_ids"]]
    except Exception as cause:
        raise PromptError(
            f"this tokenizer ({type(tokenizer).__name__}) fails on the prompt: {reason(cause)}; "
            "give token ids, or another tokenizer"
        ) from cause


def _ids_of_array(prompt: torch.Tensor | np.ndarray[Any, Any]) -> list[int]:
    dtype = str(prompt.dtype).removeprefix("torch.")
    if re.fullmatch(r"u?int\d+", dtype) is None:
        raise DtypeError(f"prompt has dtype {dtype}: token ids are integers (int64)")
    shape = list(prompt.shape)
    if len(shape) == 2 and shape[0] > 1:
        raise ShapeError(f"prompt has {shape[0]} rows, shape {shape}: {_ONE_ROW}")
    if len(shape) not in {1, 2}:
        raise ShapeError(f"prompt has shape {shape}: allowed are [seq] and [1, seq]")
    if isinstance(prompt, torch.Tensor):
        if prompt.is_meta:
            raise UsageError(
                "prompt is a tensor on the meta device, which holds no ids: give real ids"
            )
        if prompt.layout != torch.strided:
            raise UsageError(f"prompt is a tensor of layout {prompt.layout}: give a dense one")
        return [int(i) for i in prompt.detach().cpu().reshape(-1).tolist()]
    return [int(i) for i in prompt.reshape(-1).tolist()]


def _ids_of_sequence(prompt: Sequence[Any]) -> list[int]:
    first = next((item for item in prompt if _is_row(item)), None)
    if first is None:
        return [_id_of(item, position) for position, item in enumerate(prompt)]
    if len(prompt) > 1 or isinstance(first, str):
        kind = "texts" if isinstance(first, str) else "rows"
        raise ShapeError(f"prompt is a {type(prompt).__name__} of {len(prompt)} {kind}: {_ONE_ROW}")
    if isinstance(first, torch.Tensor | np.ndarray):
        return _ids_of_array(first)
    return [_id_of(item, position) for position, item in enumerate(first)]


def _is_row(item: Any) -> bool:
    is_array = isinstance(item, torch.Tensor | np.ndarray)
    return item.ndim > 0 if is_array else isinstance(item, str | list | tuple)


def _id_of(item: Any, position: int) -> int:
    is_tensor = isinstance(item, torch.Tensor | np.ndarray)
    dtype = str(item.dtype).removeprefix("torch.") if is_tensor else type(item).__name__
    if dtype in {"bool", "bool_"} or (is_tensor and "int" not in dtype):
        raise DtypeError(_not_an_id(item, dtype, position))
    try:
        return operator.index(item)
    except Exception as cause:
        raise DtypeError(_not_an_id(item, dtype, position)) from cause


def _not_an_id(item: Any, dtype: str, position: int) -> str:
    return f"prompt has a {dtype} at position {position} ({clip(item)}): token ids are integers"


def _check_range(ids: Sequence[int], vocab_size: int, *, from_text: bool) -> None:
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            hint = ": the tokenizer knows more tokens than this model" if from_text else ""
            raise TokenIdError(
                f"token id {token_id} at position {position} is out of range: this model has ids "
                f"0–{vocab_size - 1}{hint}"
            )


def vocab_size_of(model: Any) -> int:
    """How many token ids the model reads: the rows of its input embedding.

    Raises:
        UsageError: the model has no input embedding of tokens.
    """
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return int(weight.shape[0])
    size = getattr(text_settings(getattr(model, "config", None)), "vocab_size", None)
    if _is_count(size):
        return size
    raise UsageError(
        f"model {type(model).__name__} has no input embedding and its configuration no vocab_size: "
        "give a model that reads tokens"
    )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def pad_id_for(tokenizer: Any, config: Any, vocab_size: int) -> int:
    """An id to pad with: any id of the vocabulary will do, the model's own is preferred.

    Models that count positions by skipping their padding id take it from the configuration, so that
    comes first.
    """
    text = text_settings(config)
    for source, key in (
        (text, "pad_token_id"),
        (tokenizer, "pad_token_id"),
        (text, "eos_token_id"),
        (tokenizer, "eos_token_id"),
    ):
        value = getattr(source, key, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size:
            return value
    return 0
