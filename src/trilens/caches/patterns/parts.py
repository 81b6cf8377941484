"""The pattern of a block in which several modules attend: their heads, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trilens.caches.patterns.protocol import Device, Moved, Pattern
from trilens.caches.patterns.softmax.masks import SharedMasks
from trilens.errors import ShapeError, UsageError

__all__ = ["PartsPattern"]


class PartsPattern(Pattern):
    """Several patterns over the same tokens as one: head numbers go on from part to part.

    Args:
        parts: name of a part, such as "self_attn.1", and its pattern; in the order of the calls.

    Raises:
        UsageError: no parts.
        ShapeError: parts over other prompts or positions.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Mapping[str, Pattern]) -> None:
        if not parts:
            raise UsageError("a pattern of parts needs at least one: name it, and give its pattern")
        shapes = {(each.batch, each.seq_q, each.seq_k) for each in parts.values()}
        if len(shapes) > 1:
            raise ShapeError(
                f"parts have [batch, seq_q, seq_k] {sorted(shapes)}: all attend over the same ones"
            )
        self._parts = dict(parts)

    @property
    def parts(self) -> dict[str, range]:
        """Name of each part → the numbers of its heads in this pattern."""
        found, first = {}, 0
        for name, each in self._parts.items():
            found[name] = range(first, first + each.heads)
            first += each.heads
        return found

    def part(self, name: str) -> Pattern:
        """The pattern of one part, with its own head numbers.

        Raises:
            UsageError: no part has this name.
        """
        if name not in self._parts:
            raise UsageError(f"part {name!r} is unknown: this pattern has {', '.join(self._parts)}")
        return self._parts[name]

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        first = next(iter(self._parts.values()))
        heads = sum(each.heads for each in self._parts.values())
        return first.batch, heads, first.seq_q, first.seq_k

    @property
    def signed(self) -> bool:
        """True where a part may have negative weights."""
        return any(each.signed for each in self._parts.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes that all parts' dense patterns would take."""
        return sum(each.dense_bytes for each in self._parts.values())

    def _rows(self, positions: list[int], head: int | None, row: int) -> Tensor:
        return self._by_head(lambda each, own: each.rows(positions, own, row), head)

    def _columns(self, positions: list[int], head: int | None, row: int) -> Tensor:
        return self._by_head(lambda each, own: each.columns(positions, own, row), head)

    def _by_head(self, ask: Callable[[Pattern, int | None], Tensor], head: int | None) -> Tensor:
        if head is None:
            return torch.cat([ask(each, None) for each in self._parts.values()])
        name, own = next((name, own) for name, own in self.parts.items() if head in own)
        return ask(self._parts[name], head - own.start)

    def _heads(self, ask: Callable[[Pattern], Tensor]) -> Tensor:
        return torch.cat([ask(each) for each in self._parts.values()])

    def entropy(self, batch: int = 0) -> Tensor:
        """Entropy of each row in nats, as the parts give it."""
        return self._heads(lambda each: each.entropy(batch))

    def mean_distance(self, batch: int = 0) -> Tensor:
        """Mean distance in tokens, as the parts give it."""
        return self._heads(lambda each: each.mean_distance(batch))

    def received(self, batch: int = 0) -> Tensor:
        """Mean weight of a key, as the parts give it."""
        return self._heads(lambda each: each.received(batch))

    def sink_mass(self, batch: int = 0) -> Tensor:
        """Share of each row that a sink took, as the parts give it."""
        return self._heads(lambda each: each.sink_mass(batch))

    def dense(self) -> Tensor:
        """The whole pattern: [batch, heads of all parts, seq_q, seq_k]."""
        return torch.cat([each.dense() for each in self._parts.values()], dim=1)

    def unpad(self, row: int, n: int, shared: SharedMasks | None = None) -> PartsPattern:
        """One prompt of a batch padded on the right: its first n tokens, in tensors of its own."""
        return PartsPattern({k: each.unpad(row, n, shared) for k, each in self._parts.items()})

    def to(self, device: Device, moved_so_far: Moved | None = None) -> PartsPattern:
        """The pattern on another device; kept answers stay behind."""
        memo = {} if moved_so_far is None else moved_so_far
        return PartsPattern({name: each.to(device, memo) for name, each in self._parts.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The parts' tensors: "0.q" is "q" of the first one."""
        return {
            f"{number}.{name}": tensor
            for number, each in enumerate(self._parts.values())
            for name, tensor in each.tensors().items()
        }

    def params(self) -> dict[str, Any]:
        """Names and parameters of the parts."""
        return {
            "kind": "parts",
            "parts": [[name, each.params()] for name, each in self._parts.items()],
        }

    @classmethod
    def rebuild(
        cls,
        tensors: Mapping[str, Tensor],
        named: Sequence[Sequence[Any]],
        make: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Pattern],
    ) -> PartsPattern:
        """The pattern that gave these tensors, and these parts of its `params()`.

        Args:
            tensors: as `tensors` gave them.
            named: names and parameters.
            make: rebuilds one part.
        """
        parts = {}
        for number, (name, params) in enumerate(named):
            own = f"{number}."
            held = {k.removeprefix(own): t for k, t in tensors.items() if k.startswith(own)}
            parts[str(name)] = make(held, params)
        return cls(parts)

    def __repr__(self) -> str:
        return f"PartsPattern({', '.join(self._parts)}: {list(self._shape)})"
