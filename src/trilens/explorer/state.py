"""A state of the explorer: what is run, and what of it is looked at. Every one is a URL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self
from urllib.parse import urlencode

from trilens.edits import Edit, TensorFile, parse_edit
from trilens.errors import EditError, OutOfRangeError, TooLargeError, UsageError
from trilens.io.messages import clip

__all__ = ["MAX_EDITS", "MAX_NEW_TOKENS", "MAX_QUERY_BYTES", "NEW_TOKENS", "State"]

MAX_QUERY_BYTES = 40_000
"""Of a state as a URL."""

MAX_EDITS = 32
MAX_NEW_TOKENS = 200
NEW_TOKENS = 20
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a URL of the explorer says.

    Attributes:
        prompt: the text; "" before there is one.
        edits: in their text form, in order.
        new: tokens that are generated after the prompt, in [0, `MAX_NEW_TOKENS`].
        layer: that is looked at; None for the page's own choice.
        head: likewise.
        token: position in the prompt that is looked at; likewise.

    Raises:
        OutOfRangeError: `new` is not in its range.
        TooLargeError: the state is too long for a URL, or has too many edits.
    """

    prompt: str = ""
    edits: tuple[str, ...] = ()
    new: int = NEW_TOKENS
    layer: int | None = None
    head: int | None = None
    token: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.new <= MAX_NEW_TOKENS:
            raise OutOfRangeError(
                f"new {self.new} is out of range: 0–{MAX_NEW_TOKENS} tokens are generated"
            )
        if len(self.edits) > MAX_EDITS:
            raise TooLargeError(f"{len(self.edits)} edits are given: at most {MAX_EDITS} are taken")
        size = len(self.query)
        if size > MAX_QUERY_BYTES:
            raise TooLargeError(
                f"the prompt and edits take {size:,} bytes of a URL: at most {MAX_QUERY_BYTES:,} "
                "are taken; use trilens inspect for a long text"
            )

    @property
    def run(self) -> State:
        """What is run, whatever of it is looked at: one result serves all that share it."""
        return State(prompt=self.prompt, edits=self.edits, new=self.new)

    @property
    def query(self) -> str:
        """The state as a URL's query, without what has its default."""
        items = [("prompt", self.prompt)] if self.prompt else []
        items += [("edit", text) for text in self.edits]
        for field in ("new", "layer", "head", "token"):
            value = getattr(self, field)
            if value is not None and (field, value) != ("new", NEW_TOKENS):
                items.append((field, str(value)))
        return urlencode(items, errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """By the names of the attributes, as JSON can hold them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_query(cls, items: Iterable[tuple[str, str]]) -> Self:
        """Read a URL's query.

        Raises:
            UsageError: a name that no state has, a name that stands twice, or no number.
        """
        given: dict[str, Any] = {}
        edits = []
        for name, text in items:
            if name == "edit":
                edits.append(text)
            elif name not in _READERS:
                raise UsageError(
                    f"parameter {clip(name)} is unknown: a URL has {', '.join(_READERS)}, edit"
                )
            elif name in given:
                raise UsageError(f"parameter {name} stands twice in the URL: give it once")
            else:
                given[name] = _READERS[name](name, text)
        return cls(edits=tuple(edits), **given)

    @classmethod
    def from_json(cls, given: object) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            UsageError: something else.
        """
        if not isinstance(given, Mapping) or not isinstance(given.get("edits", []), list):
            raise UsageError("the request is no state: it needs a prompt and a list of edits")
        items = [("edit", each) for each in given.get("edits", [])]
        items += [(k, v) for k, v in given.items() if k != "edits" and v is not None]
        return cls.from_query((name, _as_text(name, value)) for name, value in items)

    def read_edits(self) -> tuple[Edit, ...]:
        """The edits as data.

        Raises:
            EditError: one that can't be read, or that names a file: a page may not have files of
                this machine read.
        """
        found = tuple(parse_edit(text) for text in self.edits)
        for text, edit in zip(self.edits, found, strict=True):
            values = (getattr(edit, name, None) for name in _FILES)
            if any(isinstance(value, TensorFile) for value in values):
                raise EditError(
                    f"edit {clip(text)} reads a file, which the explorer does not: use "
                    "trilens inspect --edit, or Python"
                )
        return found


_FILES = ("vector", "reference", "source", "directions", "value")


def _as_text(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{clip(str(name))} {clip(value)} is neither text nor a whole number")
    return str(value)


def _whole(name: str, text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise OutOfRangeError(f"{name} {clip(text)} is no whole number of 0 or more")
    return int(text)


_READERS: Mapping[str, Any] = {
    "prompt": lambda _, text: text,
    "new": _whole,
    "layer": _whole,
    "head": _whole,
    "token": _whole,
}
