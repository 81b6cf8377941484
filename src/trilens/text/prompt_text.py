"""A prompt's text, and which of its characters each token covers."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate
from typing import Any, Self, SupportsIndex

from trilens.caches.indices import check_index
from trilens.errors import TextNotFoundError, UsageError, ValueRangeError
from trilens.io.messages import clip

__all__ = ["PromptText"]

_COMPARED = 200  # characters of a text that is not there, when the nearest one is looked for


@dataclass(frozen=True, slots=True)
class PromptText:
    """The text of a prompt and the characters of it that each token covers.

    Attributes:
        text: without special tokens, which stand for no text.
        spans: per token, (start, stop) in characters of `text`. A token that holds a part of a
            character's bytes covers the whole character; one that stands for no text has an empty
            span, start = stop.
    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes | None]) -> Self:
        """The text that tokens spell, byte by byte.

        Args:
            pieces: the bytes of each token, None for one that stands for no text. Bytes that are
                no UTF-8 become one U+FFFD each.
        """
        whole = b"".join(piece or b"" for piece in pieces)
        # One character for each broken byte, so that characters and bytes can be counted along.
        escaped = whole.decode("utf-8", errors="surrogateescape")
        begins: list[int] = []
        at = 0
        for char in escaped:
            begins.append(at)
            at += len(char.encode("utf-8", errors="surrogateescape"))
        spans: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            stop = at + len(piece or b"")
            first = bisect_right(begins, at) - 1 if stop > at else bisect_left(begins, at)
            spans.append((first, bisect_left(begins, stop) if stop > at else first))
            at = stop
        text = "".join("\ufffd" if "\udc80" <= char <= "\udcff" else char for char in escaped)
        return cls(text, tuple(spans))

    def positions(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens that cover any of the characters start … stop − 1, ascending."""
        return self._covering([(max(start, 0), max(stop, 0))])

    def _covering(self, stretches: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """Tokens that cover a character of any stretch."""
        marked = bytearray(len(self.text))
        for start, stop in stretches:
            within = slice(start, min(stop, len(marked)))
            marked[within] = b"\1" * len(marked[within])
        before = [0, *accumulate(marked)]
        return tuple(i for i, (a, b) in enumerate(self.spans) if before[b] > before[a])

    def find(
        self, text: str, tokens: Sequence[str], occurrence: SupportsIndex | None = None
    ) -> tuple[int, ...]:
        """Positions of the tokens that cover a text, ascending.

        Args:
            text: looked for as it is written: case and spaces count. A token of which it covers a
                part is among the positions.
            tokens: the tokens as text, for messages.
            occurrence: which one, from 0, negative from the end; all of them where not given.

        Raises:
            TextNotFoundError: it does not occur; names what is nearest.
            OutOfRangeError: there are fewer occurrences.
            ValueRangeError: an empty text.
            UsageError: no text.
        """
        if not isinstance(text, str):
            raise UsageError(f"text is a {type(text).__name__} ({clip(text)}): give a string")
        if not text:
            raise ValueRangeError("text is empty: give at least one character to look for")
        found = list(self._occurrences(text))
        if not found:
            raise TextNotFoundError(
                f"text {clip(text)} does not occur in this prompt of {len(self.spans)} tokens"
                f"{self._hint(text, tokens)}"
            )
        if occurrence is not None:
            owner = f"text {clip(text)} in this prompt"
            found = [found[check_index(occurrence, len(found), "occurrence", owner, negative=True)]]
        covering = self._covering([(start, start + len(text)) for start in found])
        if not covering:
            raise TextNotFoundError(
                f"text {clip(text)} stands between tokens: no token of this prompt covers it; "
                "look for the words around it"
            )
        return covering

    def _occurrences(self, text: str) -> Iterator[int]:
        """Where it begins; occurrences do not overlap."""
        at = self.text.find(text)
        while at >= 0:
            yield at
            at = self.text.find(text, at + len(text))

    def _hint(self, text: str, tokens: Sequence[str]) -> str:
        special = [
            str(i) for i, (a, b) in enumerate(self.spans) if a == b and tokens[i] == text.strip()
        ]
        if special:
            return f": it is the special token at position {', '.join(special)}, no text"
        form = next(
            (
                form
                for form in ("NFC", "NFD", "NFKC", "NFKD")
                if unicodedata.normalize(form, text) in self.text
            ),
            None,
        )
        if form is not None:
            return f": it does in Unicode form {form}; give unicodedata.normalize({form!r}, text)"
        folded = self.text.casefold()
        wanted = text[:_COMPARED].casefold()
        # A folded text of another length would be counted in characters that are not there.
        here = self.text if len(folded) != len(self.text) else folded
        match = SequenceMatcher(None, here, wanted, autojunk=False).find_longest_match()
        near = self.positions(match.a, match.a + match.size)
        if not near:
            return ""
        where = str(near[0]) if len(near) == 1 else f"{near[0]}–{near[-1]}"
        spelled = self.text[self.spans[near[0]][0] : self.spans[near[-1]][1]]
        return f": nearest is {clip(spelled)} at position{'s' * (len(near) > 1)} {where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {"text": self.text, "spans": [list(span) for span in self.spans]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: spans that do not lie in the text.
            KeyError, TypeError: values of another shape.
        """
        text = str(values["text"])
        spans = tuple((int(start), int(stop)) for start, stop in values["spans"])
        if any(not 0 <= start <= stop <= len(text) for start, stop in spans):
            raise ValueError(f"a token's span lies outside the text of {len(text)} characters")
        return cls(text, spans)
