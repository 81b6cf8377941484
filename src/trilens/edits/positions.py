"""The tokens that an edit names, and which of a prompt's tokens they are.

Positions count the real tokens of a prompt from 0, and go on over the tokens that are generated.
Negative ones count from the prompt's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trilens.errors import EditError, EditRangeError, OutOfRangeError
from trilens.io.messages import clip
from trilens.numbers import whole_number

__all__ = [
    "Mask",
    "PerPrompt",
    "Places",
    "Positions",
    "check_positions_within",
    "positions_of",
    "read_positions",
    "selected",
    "text_of",
]

_WORDS = ("last", "prompt", "generated")
_FAR = 1 << 60
_HOW = (
    "give an index, a slice, a sequence of indices, a bool mask of the prompt's tokens, 'last', "
    "'prompt', 'generated', or PerPrompt([…])"
)


@dataclass(frozen=True, slots=True)
class Mask:
    """One bool for each token of a prompt."""

    tokens: tuple[bool, ...]


Places: TypeAlias = "str | slice | tuple[int, ...] | Mask | None"
"""Positions of one prompt, read: None for all tokens, the prompt's and generated ones."""


@dataclass(frozen=True, slots=True)
class PerPrompt:
    """Positions that differ from prompt to prompt of a batch.

    Attributes:
        entries: one for each prompt, in order, each like `positions=`; an empty list for a prompt
            that is left as it is, None for all of its tokens.

    Raises:
        EditError: no entries, or entries that are empty in every prompt.
    """

    entries: Sequence[Any]

    def __post_init__(self) -> None:
        if isinstance(self.entries, str) or not isinstance(self.entries, Iterable):
            raise EditError(
                f"PerPrompt({clip(self.entries)}) is no list: give positions for each prompt"
            )
        read = tuple(_read(each, empty=True) for each in self.entries)
        if all(each == () for each in read):
            raise EditError("PerPrompt names no position of any prompt: the edit would do nothing")
        object.__setattr__(self, "entries", read)


Positions: TypeAlias = (
    "SupportsIndex | slice | Sequence[SupportsIndex] | Sequence[bool] | NDArray[Any] | PerPrompt "
    "| Literal['last', 'prompt', 'generated'] | None"
)
"""What `positions=` takes: an index, a slice, indices, a bool mask of the prompt's tokens, a word,
`PerPrompt`; a tensor or array is a sequence of indices or a mask."""


def read_positions(value: object) -> Places | PerPrompt:
    """Read what a caller gave as positions, before any prompt is known.

    Raises:
        EditError: no positions at all, none, or not distinct.
        EditRangeError: not whole numbers.
    """
    return value if isinstance(value, PerPrompt) else _read(value)


def _read(value: object, *, empty: bool = False) -> Places:
    if value is None or (isinstance(value, str) and value in _WORDS):
        return value
    if isinstance(value, slice):
        return _read_slice(value)
    if isinstance(value, Mask):
        value = value.tokens
    if isinstance(value, str | bool | PerPrompt | bytes | dict):
        raise EditError(f"positions {clip(value)} cannot be read: {_HOW}")
    # A tensor of one number has an index, and no items.
    items = [value] if getattr(value, "shape", None) == () else value
    try:
        if not isinstance(items, Iterable):
            return (whole_number(value, "position"),)
        chosen = list(items)
        if chosen and all(_is_bool(each) for each in chosen):
            return _read_mask(tuple(bool(each) for each in chosen), empty=empty)
        numbers = tuple(whole_number(each, "position") for each in chosen)
    except OutOfRangeError as error:
        raise EditRangeError(f"{error}: {_HOW}") from None
    if not numbers and not empty:
        raise EditError(f"positions are empty: the edit would do nothing; {_HOW}")
    if len(set(numbers)) < len(numbers):
        raise EditError(f"positions {clip(list(numbers))} are not distinct: name each token once")
    return numbers


def _is_bool(value: object) -> bool:
    return isinstance(value, bool | np.bool_) or str(getattr(value, "dtype", "")).endswith("bool")


def _read_mask(tokens: tuple[bool, ...], *, empty: bool) -> Places:
    if not any(tokens) and not empty:
        raise EditError("positions are a mask that is False everywhere: the edit would do nothing")
    return Mask(tokens) if any(tokens) else ()


def _read_slice(value: slice) -> slice:
    try:
        start, stop, step = (
            None if each is None else whole_number(each, "position")
            for each in (value.start, value.stop, value.step)
        )
    except OutOfRangeError as error:
        raise EditRangeError(f"{error}: {_HOW}") from None
    if step is not None and step < 1:
        raise EditError(
            f"positions have the step {step}: a slice of positions goes forward, by 1 or more"
        )
    return slice(start, stop, step)


def _bounds(places: slice, prompt: int) -> tuple[int, int | None, int]:
    """First position, the one after the last (None for the end of the text), and the step."""
    start, stop = (
        each + prompt if each is not None and each < 0 else each
        for each in (places.start, places.stop)
    )
    # NumPy's integers end somewhere, and no text is as long.
    first, step = min(max(start or 0, 0), _FAR), min(places.step or 1, _FAR)
    return first, None if stop is None else min(max(stop, 0), _FAR), step


def selected(places: Places, prompt: int, start: int, stop: int) -> NDArray[np.bool_]:
    """Which of the text positions start … stop − 1 are named.

    Args:
        places: positions of one prompt, as `read_positions` gives them.
        prompt: tokens of the prompt.
        start: the first position asked for.
        stop: the one after the last.

    Shapes:
        returns: [stop − start]
    """
    at = np.arange(start, stop)
    if places is None:
        return np.ones(len(at), bool)
    if isinstance(places, str):
        words = {"last": at == prompt - 1, "prompt": at < prompt, "generated": at >= prompt}
        return np.asarray(words[places], bool)
    if isinstance(places, slice):
        first, end, step = _bounds(places, prompt)
        inside = (at >= first) & ((at - first) % step == 0)
        return np.asarray(inside if end is None else inside & (at < end), bool)
    if isinstance(places, Mask):
        found = np.zeros(len(at), bool)
        inner = at < min(prompt, len(places.tokens))
        found[inner] = np.asarray(places.tokens, bool)[at[inner]]
        return found
    named = np.array([each + prompt if each < 0 else each for each in places], np.int64) - start
    found = np.zeros(len(at), bool)
    found[named[(named >= 0) & (named < len(at))]] = True
    return found


def positions_of(places: Places, prompt: int, total: int) -> list[int]:
    """The positions named among the first `total` of the text: indices as given, others ascending.

    Args:
        places: positions of one prompt.
        prompt: tokens of the prompt.
        total: tokens of the prompt and those generated.
    """
    if isinstance(places, tuple):
        return [each + prompt if each < 0 else each for each in places]
    return [int(i) for i in np.flatnonzero(selected(places, prompt, 0, total))]


def check_positions_within(places: Places, prompt: int, new_tokens: int, owner: str) -> None:
    """Refuse positions that a text cannot have.

    Args:
        places: positions of one prompt.
        prompt: tokens of the prompt.
        new_tokens: the most tokens that are generated, 0 where none are.
        owner: the prompt, for messages.

    Raises:
        EditRangeError: an index outside the text, a slice without a token, a mask of another
            length, or generated tokens where none are generated.
    """
    total = prompt + new_tokens
    span = f"{owner} has positions 0–{prompt - 1} (or −{prompt} to −1)"
    if new_tokens:
        span += f", generated tokens {prompt}–{total - 1}"
    if isinstance(places, tuple):
        for each in places:
            if not -prompt <= each < total:
                raise EditRangeError(f"position {each} is out of range: {span}")
        if len(set(positions_of(places, prompt, total))) < len(places):
            raise EditRangeError(
                f"positions {clip(list(places))} name a token twice: {owner} has {prompt} tokens"
            )
    elif isinstance(places, Mask):
        if len(places.tokens) != prompt:
            raise EditRangeError(
                f"positions are a mask of {len(places.tokens)} tokens: {owner} has {prompt}"
            )
    elif places == "generated" and not new_tokens:
        raise EditRangeError(
            "positions 'generated' name nothing: no token is generated here; use generate, or "
            "name tokens of the prompt"
        )
    elif isinstance(places, slice) and not selected(places, prompt, 0, total).any():
        raise EditRangeError(f"positions {text_of(places)} name no token: {span}")


def text_of(positions: Places | PerPrompt) -> str:
    """Positions in the text form: ``0,3``, ``2:8``, ``last``, ``*`` for all, ``|3||*`` per prompt.

    A mask becomes the indices of its tokens.
    """
    if isinstance(positions, PerPrompt):
        return "".join(f"|{'' if each == () else text_of(each)}" for each in positions.entries)
    if positions is None:
        return "*"
    if isinstance(positions, str):
        return positions
    if isinstance(positions, Mask):
        return ",".join(str(i) for i, on in enumerate(positions.tokens) if on)
    if isinstance(positions, slice):
        ends = ["" if each is None else str(each) for each in (positions.start, positions.stop)]
        return ":".join([*ends, str(positions.step)] if positions.step else ends)
    return ",".join(map(str, positions))
