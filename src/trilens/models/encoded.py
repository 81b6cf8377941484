"""Prompts as tokenizers hand them out: encoded batches with a mask, and chat messages."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from tokenizers import Encoding

from trilens.errors import (
    DoubledBosWarning,
    NoChatTemplateError,
    NoTokenizerError,
    PromptError,
    ShapeError,
    UsageError,
)
from trilens.io.messages import reason

__all__ = ["each_prompt", "ids_of_encoding", "ids_of_messages", "is_messages", "warn_doubled_bos"]

_IDS, _MASK = "input_ids", "attention_mask"
# What tokenizers add beside the ids and a forward pass of one prompt does not need.
_ASIDE = {
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "num_truncated_tokens",
}
_SHOWN = 4


def is_messages(prompt: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether this is a chat: a sequence of mappings with a role each."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes)
        and len(prompt) > 0
        and all(isinstance(each, Mapping) and "role" in each for each in prompt)
    )


def each_prompt(prompts: Iterable[Any]) -> Iterable[Any]:
    """The prompts of a batch: as they are, or what a tokenizer encoded together, taken apart.

    Raises:
        UsageError: it is one chat, or a mapping without token ids.
    """
    if is_messages(prompts):
        raise UsageError(
            "prompts is one chat: give a list of chats, or read a single one with capture"
        )
    if not isinstance(prompts, Mapping):
        return prompts
    ids = _of_mapping(prompts)
    if not _has_rows(ids):
        return [prompts]
    columns = {
        key: value
        for key, value in prompts.items()
        if hasattr(value, "__len__") and len(value) == len(ids)
    }
    return [{key: value[row] for key, value in columns.items()} for row in range(len(ids))]


def ids_of_encoding(encoding: Mapping[str, Any] | Encoding) -> Any:
    """The token ids of what a tokenizer returned, without the padding that its mask names.

    Args:
        encoding: `input_ids` and, where there is padding, `attention_mask`: of one prompt.

    Returns:
        A sequence or tensor of ids, as they were given.

    Raises:
        ShapeError: several prompts, or a mask of another length than the ids.
        UsageError: no ids; values that a forward pass of ids alone would not see; a mask that
            hides tokens between others.
    """
    if isinstance(encoding, Encoding):
        encoding = {_IDS: encoding.ids, _MASK: encoding.attention_mask}
    ids = _row(_of_mapping(encoding))
    _refuse_more(encoding)
    if _MASK not in encoding:
        return ids
    mask = _numbers(_row(encoding[_MASK]), _MASK)
    if _has_rows(ids) or mask.shape != (len(ids),):
        if _has_rows(ids):
            return ids  # refused by whoever reads rows
        raise ShapeError(
            f"{_MASK} has shape {list(mask.shape)}, and there are {len(ids)} {_IDS}: one number "
            "for each is needed"
        )
    if not np.isin(mask, (0, 1)).all():
        raise UsageError(f"{_MASK} holds other numbers than 0 and 1: give a mask of the padding")
    kept = np.flatnonzero(mask)
    if not len(kept):
        return ids[:0]
    first, end = int(kept[0]), int(kept[-1]) + 1
    if end - first != len(kept):
        raise UsageError(
            f"{_MASK} hides tokens between others (position {_first_gap(kept)} is the first): it "
            "may only hide padding before and after the prompt"
        )
    return ids[first:end]


def ids_of_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, answer: bool = True
) -> list[int]:
    """A chat as the tokenizer's template writes it, with the start of an answer.

    Args:
        messages: each with role and content.
        tokenizer: with a template.
        answer: write the start of an answer; False where the chat is whole.

    Raises:
        NoTokenizerError: the model has no tokenizer.
        NoChatTemplateError: the tokenizer has no template.
        UsageError: a message holds something else than text.
        PromptError: the template refuses these messages.
    """
    if tokenizer is None:
        raise NoTokenizerError(
            "prompt is a chat, and this model has no tokenizer: give token ids, or pass a tokenizer"
        )
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or not getattr(tokenizer, "chat_template", True):
        raise NoChatTemplateError(
            f"prompt is a chat, and the tokenizer ({type(tokenizer).__name__}) has no chat "
            "template: set tokenizer.chat_template to the model's own, or write the prompt as text"
        )
    for number, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else ()
        odd = [p.get("type") for p in parts if isinstance(p, Mapping) and p.get("type") != "text"]
        if odd:
            raise UsageError(
                f"message {number} holds a part of type {odd[0]!r}: only text is read; for "
                "images give lens.capture inputs=processor.apply_chat_template(messages, "
                "tokenize=True, return_dict=True, return_tensors='pt')"
            )
    plain = [dict(message) for message in messages]
    try:
        found = apply(plain, add_generation_prompt=answer, tokenize=True, return_dict=True)
    # A template is a program of the checkpoint, and raises what it likes.
    except Exception as cause:
        raise PromptError(f"the chat template refuses these messages: {reason(cause)}") from cause
    ids: list[int] = [int(i) for i in found[_IDS]]
    return ids


def warn_doubled_bos(ids: Sequence[int], tokenizer: Any) -> None:
    """Warn where the first token of the model stands twice: a template wrote it into the text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if isinstance(bos, int) and list(ids[:2]) == [bos, bos]:
        token = getattr(tokenizer, "bos_token", None)
        warnings.warn(
            f"prompt begins with two {token} tokens (id {bos}): the text held one already, as chat "
            "templates write it; encode it with add_special_tokens=False, or give the messages",
            DoubledBosWarning,
            stacklevel=6,
        )


def _of_mapping(encoding: Mapping[str, Any]) -> Any:
    if _IDS not in encoding:
        keys = ", ".join(map(repr, list(encoding)[:_SHOWN])) or "nothing"
        raise UsageError(
            f"prompt is a mapping of {keys}: {_IDS!r} is needed, as tokenizers give it"
        )
    return encoding[_IDS]


def _refuse_more(encoding: Mapping[str, Any]) -> None:
    """What the model would be given beside ids and mask, and would not get from us."""
    for key, value in encoding.items():
        if key in {_IDS, _MASK, *_ASIDE} or value is None:
            continue
        if key.endswith("token_type_ids") and not _numbers(_row(value), key).any():
            continue
        raise UsageError(
            f"prompt holds {key}, which is no token id: give lens.capture the whole as inputs=, "
            "or the token ids alone"
        )


def _numbers(values: Any, key: str) -> np.ndarray[Any, Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as cause:
        raise ShapeError(f"{key} has rows of several lengths: give one prompt") from cause
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{key} holds {array.dtype}: numbers are needed")
    return array


def _has_rows(values: Any) -> bool:
    if isinstance(values, torch.Tensor | np.ndarray):
        return values.ndim > 1
    return any(isinstance(each, list | tuple | torch.Tensor | np.ndarray) for each in values)


def _row(values: Any) -> Any:
    """The one row of values with rows; anything else as it is."""
    return values[0] if _has_rows(values) and len(values) == 1 else values


def _first_gap(kept: np.ndarray[Any, Any]) -> int:
    return int(kept[int(np.flatnonzero(np.diff(kept) > 1)[0])]) + 1
