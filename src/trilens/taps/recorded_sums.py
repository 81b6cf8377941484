"""Sums of streams, streams scaled and projected, while a probe runs: as they were computed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

from trilens.caches.storage import address_of
from trilens.models.sites.sums import SUMS, is_linear_call, is_rowwise
from trilens.models.trace import LinearCall, ScaledCall, SumCall
from trilens.taps.functions import writes_into
from trilens.taps.overwritten import Overwritten, Seen

__all__ = ["RecordedSums"]

_SCALES = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "div", "div_",
           "__truediv__", "__itruediv__", "true_divide"}  # fmt: skip


class RecordedSums:
    """The sums and scalings of one probe.

    Args:
        seq: tokens of the probe.
        weights: addresses of the model's weights and buffers.
        overwritten: keeps what is written into later.
    """

    def __init__(self, seq: int, weights: Collection[int], overwritten: Overwritten) -> None:
        self._seq = seq
        self._weights = weights
        self._overwritten = overwritten
        self._sums: list[tuple[SumCall, list[Seen]]] = []
        self._scaled: list[tuple[ScaledCall, list[Seen]]] = []
        self._linears: list[LinearCall] = []
        # Of each running module's call, by its path and the tick at which it began.
        self._orders: dict[tuple[str, int], int] = {}
        # The left operand of a call that is running, where it will be written into.
        self._written: Seen | None = None

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        """A function is about to run: keep what a recorded tensor holds that it writes into."""
        target = writes_into(name, args)
        self._written = None
        if target is not None:
            if name in SUMS or name in _SCALES:
                self._written = self._overwritten.see(target)
            self._overwritten.before_write(target)

    def after(
        self,
        name: str,
        args: tuple[Any, ...],
        options: dict[str, Any],
        result: Any,
        path: str,
        tick: int,
        begun: int,
    ) -> None:
        """A function ran, inside the module of this path, whose call began at tick `begun`."""
        if len(args) < 2 or not is_rowwise(result, self._seq):
            return
        if is_linear_call(name, result, self._seq):
            self._note_linear(path, tick, begun, result)
        a, b = args[:2]
        if name in _SCALES or (name in SUMS and self._is_weight(a, b)):
            self._note_scaled(a, b, result, path, tick)
        elif name in SUMS and "alpha" not in options:
            self._note_sum(a, b, result, path, tick)

    def _note_linear(self, path: str, tick: int, begun: int, result: Tensor) -> None:
        order = self._orders.get((path, begun), 0)
        self._orders[path, begun] = order + 1
        self._linears.append(LinearCall(path, tick, order, result))

    def _is_weight(self, *values: Any) -> bool:
        return any(isinstance(v, Tensor) and address_of(v) in self._weights for v in values)

    def _note_sum(self, a: Any, b: Any, result: Tensor, path: str, tick: int) -> None:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return
        see = self._overwritten.see
        seen = [self._written or see(a), see(b), see(result)]
        call = SumCall(path, tick, a, b, result, self._written is not None)
        self._sums.append((call, seen))

    def _note_scaled(self, a: Any, b: Any, result: Tensor, path: str, tick: int) -> None:
        x, factor = (a, b) if isinstance(a, Tensor) and a.shape == result.shape else (b, a)
        if not isinstance(x, Tensor) or x.shape != result.shape:
            return
        several = isinstance(factor, Tensor) and factor.numel() > 1
        if several and (not self._is_weight(factor) or factor.numel() != factor.shape[-1]):
            return
        see = self._overwritten.see
        seen = [self._written or see(x), see(result)]
        self._scaled.append((ScaledCall(path, tick, x, result), seen))

    def sums(self) -> tuple[SumCall, ...]:
        """The sums, with what their operands held."""
        return tuple(
            replace(call, left=left, right=right, result=result)
            for call, seen in self._sums
            for left, right, result in [map(self._overwritten.as_seen, seen)]
        )

    def linears(self) -> tuple[LinearCall, ...]:
        """The products, as they are now."""
        return tuple(self._linears)

    def scaled(self) -> tuple[ScaledCall, ...]:
        """The scalings, with what went in and came out."""
        return tuple(
            replace(call, x=x, result=result)
            for call, seen in self._scaled
            for x, result in [map(self._overwritten.as_seen, seen)]
        )
