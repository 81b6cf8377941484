"""Which token of one prompt stands for which token of another, such as a corrupted one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, SupportsIndex

from trilens.caches.indices import check_index
from trilens.results import Tabular

__all__ = ["Alignment", "align"]

_Block = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Alignment(Tabular):
    """Tokens of one prompt beside those of another.

    Attributes:
        tokens: of this prompt, as text.
        other_tokens: of the other prompt.
        pairs: (position, position in the other), ascending in both. In a stretch that was replaced
            by one of another length, the last tokens are paired with the last ones.
        equal: the pairs whose tokens are the same.
    """

    tokens: tuple[str, ...]
    other_tokens: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    equal: tuple[tuple[int, int], ...]

    @property
    def is_equal_length(self) -> bool:
        """Whether both prompts have as many tokens."""
        return len(self.tokens) == len(self.other_tokens)

    @property
    def replaced(self) -> tuple[tuple[int, int], ...]:
        """The pairs whose tokens differ."""
        same = set(self.equal)
        return tuple(pair for pair in self.pairs if pair not in same)

    def map(self, position: SupportsIndex) -> int | None:
        """The position in the other prompt of a token; None where it has no partner.

        Raises:
            OutOfRangeError: a position that this prompt does not have.
        """
        owner = f"this prompt of {len(self.tokens)} tokens"
        at = check_index(position, len(self.tokens), "position", owner, negative=True)
        return dict(self.pairs).get(at)

    def table(self) -> list[dict[str, Any]]:
        """One row per pair, and per token without a partner (None on the other side), in order."""
        return list(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        same, here, there = set(self.equal), 0, 0
        for i, j in (*self.pairs, (len(self.tokens), len(self.other_tokens))):
            for at in range(here, i):
                yield self._row(at, None, "only here")
            for at in range(there, j):
                yield self._row(None, at, "only there")
            if i < len(self.tokens):
                yield self._row(i, j, "equal" if (i, j) in same else "replaced")
            here, there = i + 1, j + 1

    def _row(
        self,
        here: int | None,
        there: int | None,
        kind: Literal["equal", "replaced", "only here", "only there"],
    ) -> dict[str, Any]:
        return {
            "position": here,
            "token": None if here is None else self.tokens[here],
            "other_position": there,
            "other_token": None if there is None else self.other_tokens[there],
            "kind": kind,
        }

    def to_dict(self) -> dict[str, Any]:
        """Both prompts and the pairs, as JSON takes them."""
        return {
            "tokens": list(self.tokens),
            "other_tokens": list(self.other_tokens),
            "pairs": [list(pair) for pair in self.pairs],
            "equal": [list(pair) for pair in self.equal],
        }


def align(
    tokens: Sequence[str],
    other_tokens: Sequence[str],
    keys: tuple[Sequence[Hashable], Sequence[Hashable]],
) -> Alignment:
    """Align two prompts: as many equal tokens as are found, and what stands between them.

    What both begin and end with is matched first. Prompts of one length are aligned position by
    position, unless shifting matches more tokens.

    Args:
        tokens: of this prompt, as text.
        other_tokens: of the other.
        keys: what tells tokens apart, per prompt.
    """
    here, there = list(keys[0]), list(keys[1])
    blocks = _matched(here, there)
    equal = [(a + n, b + n) for a, a_stop, b, _ in blocks for n in range(a_stop - a)]
    if len(here) == len(there):
        straight = [(i, i) for i, key in enumerate(here) if key == there[i]]
        if len(straight) >= len(equal):
            equal = straight
    return Alignment(
        tuple(tokens), tuple(other_tokens), tuple(_paired(equal, len(here), len(there))), (*equal,)
    )


def _matched(here: list[Hashable], there: list[Hashable]) -> list[_Block]:
    """Stretches of equal tokens, as (start, stop, start there, stop there)."""
    shortest = min(len(here), len(there))
    front = next((i for i in range(shortest) if here[i] != there[i]), shortest)
    rest = shortest - front
    back = next((i for i in range(rest) if here[-1 - i] != there[-1 - i]), rest)
    middle = here[front : len(here) - back], there[front : len(there) - back]
    found = SequenceMatcher(None, *middle, autojunk=False).get_matching_blocks()
    return [
        (0, front, 0, front),
        *((m.a + front, m.a + front + m.size, m.b + front, m.b + front + m.size) for m in found),
        (len(here) - back, len(here), len(there) - back, len(there)),
    ]


def _paired(equal: list[tuple[int, int]], n: int, m: int) -> Iterator[tuple[int, int]]:
    here, there = 0, 0
    for i, j in (*equal, (n, m)):
        both = min(i - here, j - there)
        yield from ((i - both + k, j - both + k) for k in range(both))
        if i < n:
            yield i, j
        here, there = i + 1, j + 1
