"""The effective attention of a layer whose heads are recurrences per channel: one head each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from trilens.caches.indices import check_index
from trilens.caches.patterns.channel.pattern import ChannelPattern
from trilens.caches.patterns.recurrent.base import RecurrenceBase
from trilens.caches.patterns.recurrent.blocks import Recurrence
from trilens.errors import ShapeError, UsageError

__all__ = ["ChannelHeadsPattern"]


class ChannelHeadsPattern(RecurrenceBase):
    """Heads side by side, each the mean over its own channels of a diagonal recurrence.

    The heads share nothing: each has steps, rates, queries and keys of its own.

    Args:
        parts: the heads in order, over the same prompts.

    Raises:
        UsageError: no part, or one that is no `ChannelPattern`.
        ShapeError: parts over different prompts.

    Source: arXiv 2403.01590 for the weights, 2405.16712 for the heads.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[ChannelPattern]) -> None:
        self._parts = tuple(parts)
        if not self._parts or not all(isinstance(part, ChannelPattern) for part in self._parts):
            kinds = ", ".join(type(part).__name__ for part in self._parts) or "nothing"
            raise UsageError(f"heads made of {kinds}: one ChannelPattern or more is needed")
        shapes = [(part.batch, part.seq_q) for part in self._parts]
        if len(set(shapes)) > 1:
            raise ShapeError(
                f"heads of {shapes} prompts × tokens do not fit each other: all have the same"
            )
        super().__init__(
            {
                f"{head}.{name}": tensor
                for head, part in enumerate(self._parts)
                for name, tensor in part.tensors().items()
            }
        )

    @property
    def parts(self) -> tuple[ChannelPattern, ...]:
        """The heads, each a pattern of its own."""
        return self._parts

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        first = self._parts[0]
        return first.batch, len(self._parts), first.seq_q, first.seq_k

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        return torch.cat([part.rows(positions, None, row) for part in self._of(head)])

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        return torch.cat([part.columns(positions, None, row) for part in self._of(head)])

    def recurrences(self, batch: int, head: int | None = None) -> Iterator[Recurrence]:
        """The recurrences of one head.

        Raises:
            UsageError: no head is named, and there are several: their weights do not add up.
        """
        found = self._of(head)
        if len(found) > 1:
            raise UsageError(
                f"recurrences of {len(found)} heads at once are not one pattern: name a head"
            )
        return found[0].recurrences(batch)

    def params(self) -> dict[str, Any]:
        """The kind alone."""
        return {"kind": "channel_heads"}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> Self:
        """The pattern that gave these `tensors()` and `params()`."""
        heads: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, part = name.partition(".")
            heads.setdefault(int(head), {})[part] = tensor
        return cls([ChannelPattern(**heads[head]) for head in sorted(heads)])

    def _of(self, head: int | None) -> tuple[ChannelPattern, ...]:
        if head is None:
            return self._parts
        return (self._parts[check_index(head, self.heads, "head", "this pattern")],)

    def _cut(self, name: str, row: int, n: int) -> Tensor:
        head, _, part = name.partition(".")
        return self._parts[int(head)].cut(part, row, n)
