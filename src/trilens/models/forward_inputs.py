"""Inputs beyond text: any mapping of tensors that a model's forward accepts, checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trilens.errors import (
    DtypeError,
    EmptyPromptError,
    NonFiniteError,
    PromptTooLongError,
    ShapeError,
    TokenIdError,
    TrilensError,
    UsageError,
)
from trilens.io.messages import clip, listed, reason
from trilens.io.short_memory import is_short_of_memory
from trilens.text.source import NO_TOKEN

__all__ = ["fitting", "read_inputs"]

_IDS, _EMBEDS, _MASK = "input_ids", "inputs_embeds", "attention_mask"
_OURS = {
    "past_key_values": "a capture is one pass over the whole prompt",
    "use_cache": "a capture runs without a cache",
    "return_dict": "a capture reads the model's own output class",
    "output_attentions": "ask with attention=True",
    "output_hidden_states": "ask with residual='all'",
    "output_router_logits": "ask with gates=True",
    "logits_to_keep": "ask with logits='last'",
    "labels": "a capture computes no loss",
}
"""Parameters of a forward that a capture sets itself, and how it is asked instead."""
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "position_ids")
_SCALARS = (bool, int, float, str)


def read_inputs(
    inputs: object, model: PreTrainedModel, *, vocab: int, max_positions: int | None
) -> tuple[dict[str, Any], Tensor]:
    """Check what a caller gives as inputs of a forward.

    Args:
        inputs: what a processor returned for one text, or any mapping of tensors, arrays and plain
            options by the names of the forward's parameters.
        model: whose forward it is.
        vocab: ids that it reads.
        max_positions: the most tokens of a prompt; None for any number.

    Returns:
        The arguments, one row each; and the token ids [seq] int64 on the CPU, −1 where a vector
        stands in place of a token.

    Raises:
        UsageError: no mapping, a name that the forward does not take or that a capture sets, a
            mask that hides tokens, or no tokens at all.
        ShapeError: several prompts, or lengths that differ.
        DtypeError: token ids that are no integers, or a value that is no tensor.
        NonFiniteError: NaN or infinity among pixels or vectors.
        EmptyPromptError, TokenIdError, PromptTooLongError: as of a prompt.
    """
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"inputs is a {type(inputs).__name__}: give a mapping of tensors by the names that "
            "the model's forward takes, as processor(…, return_tensors='pt') does"
        )
    given = {str(name): value for name, value in inputs.items() if value is not None}
    _check_names(given, model)
    held = {name: _value(name, value) for name, value in given.items()}
    if (_IDS in held) == (_EMBEDS in held):
        both = "both" if _IDS in held else f"neither ({listed(held, 8)})"
        raise UsageError(
            f"inputs holds {both}: give input_ids, or inputs_embeds in place of the tokens"
        )
    if _IDS in held:
        held[_IDS] = row = _one_row(_IDS, held[_IDS], 2)
        ids = _checked_ids(row[0], vocab, model.config)
    else:
        held[_EMBEDS] = row = _one_row(_EMBEDS, held[_EMBEDS], 3)
        _check_width(row, model)
        ids = torch.full((row.shape[1],), NO_TOKEN, dtype=torch.int64)
    seq = len(ids)
    if not seq:
        raise EmptyPromptError("inputs has no tokens: give at least one")
    if max_positions is not None and seq > max_positions:
        raise PromptTooLongError(
            f"inputs has {seq} tokens, this model has {max_positions} positions: shorten it to at "
            f"most {max_positions} tokens"
        )
    for name in (_MASK, *_PER_TOKEN):
        if name in held:
            held[name] = _per_token(name, held[name], seq)
    if "position_ids" in held and _MASK not in held and _MASK in _taken(model):
        # Without a mask, transformers takes a jump of the positions for the seam of two texts.
        held[_MASK] = torch.ones(1, seq, dtype=torch.int64)
    return held, ids


@contextmanager
def fitting(model: PreTrainedModel, arguments: Mapping[str, Any] | None) -> Iterator[None]:
    """Say of a model's own failure that it is these inputs that it fails on.

    Raises:
        UsageError: the forward failed.
    """
    try:
        yield
    except TrilensError:
        raise
    except Exception as cause:
        if arguments is None or is_short_of_memory(cause):
            raise
        shapes = ", ".join(
            f"{name} {list(value.shape)}"
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        )
        raise UsageError(
            f"{type(model).__name__} does not run on these inputs ({shapes}): {reason(cause)}; "
            "give what its own processor makes"
        ) from cause


def _check_names(given: Mapping[str, Any], model: PreTrainedModel) -> None:
    name, taken = type(model).__name__, _taken(model)
    for each in given:
        if each in _OURS:
            raise UsageError(f"inputs holds {each!r}, which a capture sets: {_OURS[each]}")
        if each not in taken:
            allowed = [one for one in taken if one not in _OURS]
            raise UsageError(
                f"inputs holds {each!r}, which the forward of {name} does not take: leave it out; "
                f"it takes {', '.join(allowed)}"
            )


def _taken(model: PreTrainedModel) -> list[str]:
    """The names that the forward takes; what it passes on unseen is not among them."""
    known = inspect.signature(model.forward).parameters.items()
    return [name for name, p in known if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _value(name: str, value: Any) -> Any:
    """A tensor where it is an array or a list of numbers; finite, and in memory."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise DtypeError(f"inputs[{name!r}] holds {value.dtype}: numbers are needed")
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        return [_value(name, each) for each in value]
    if isinstance(value, list | tuple):
        try:
            value = torch.tensor(value)
        except (ValueError, TypeError, RuntimeError) as cause:
            raise DtypeError(
                f"inputs[{name!r}] is a {type(value).__name__} that makes no tensor: give "
                "processor(…, return_tensors='pt')"
            ) from cause
    if isinstance(value, _SCALARS):
        return value
    if not isinstance(value, Tensor):
        raise DtypeError(
            f"inputs[{name!r}] is a {type(value).__name__} ({clip(value)}): give a tensor"
        )
    if value.is_meta:
        raise UsageError(f"inputs[{name!r}] is on the meta device, which holds no numbers")
    value = value.detach()
    # A mask of the attention may say −∞.
    if value.is_floating_point() and "mask" not in name and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise NonFiniteError(
            f"inputs[{name!r}] holds NaN or infinity in {bad} of {value.numel()} places: check "
            "what made it"
        )
    return value


def _one_row(name: str, value: Any, rank: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise DtypeError(f"inputs[{name!r}] is a {type(value).__name__}: give a tensor")
    row = value[None] if value.ndim == rank - 1 else value
    if row.ndim != rank:
        axes = "[1, seq]" if rank == 2 else "[1, seq, d_model]"
        raise ShapeError(f"inputs[{name!r}] has shape {list(value.shape)}: allowed is {axes}")
    if row.shape[0] != 1:
        raise ShapeError(
            f"inputs[{name!r}] has {row.shape[0]} rows, and a capture takes one prompt: give the "
            "processor one text with its images"
        )
    return row


def _checked_ids(ids: Tensor, vocab: int, config: Any) -> Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        dtype = str(ids.dtype).removeprefix("torch.")
        raise DtypeError(f"inputs['input_ids'] has dtype {dtype}: token ids are integers (int64)")
    plain = ids.cpu().long()
    # The id of a placeholder may lie beyond the table: its place is filled with the image.
    names = (
        f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")
    )
    held = {getattr(config, name, None) for name in names}
    for position, token in enumerate(plain.tolist()):
        if not 0 <= token < vocab and token not in held:
            raise TokenIdError(
                f"token id {token} at position {position} is out of range: this model has ids "
                f"0–{vocab - 1}"
            )
    return plain


def _check_width(vectors: Tensor, model: PreTrainedModel) -> None:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not vectors.is_floating_point():
        raise DtypeError("inputs['inputs_embeds'] holds integers: give vectors of real numbers")
    if isinstance(weight, Tensor) and weight.ndim == 2 and vectors.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"inputs['inputs_embeds'] has vectors of {vectors.shape[-1]} numbers: this model's "
            f"embeddings have {weight.shape[1]}"
        )


def _per_token(name: str, value: Any, seq: int) -> Any:
    """A tensor with a number for each token."""
    if not isinstance(value, Tensor):
        return value
    value = value[None] if value.ndim == 1 else value
    if value.ndim == 2 and value.shape[0] != 1:
        raise ShapeError(
            f"inputs[{name!r}] has {value.shape[0]} rows, and a capture takes one prompt: give the "
            "processor one text with its images"
        )
    if value.shape[-1] != seq:
        raise ShapeError(
            f"inputs[{name!r}] has shape {list(value.shape)}, and there are {seq} tokens: one "
            "number for each is needed"
        )
    if name == _MASK and value.ndim == 2 and not bool(value.bool().all()):
        hidden = int(value.bool().logical_not().sum())
        raise UsageError(
            f"inputs['attention_mask'] hides {hidden} of {seq} tokens: give one text without "
            "padding (processor(…, padding=False)), or leave the mask out"
        )
    return value
