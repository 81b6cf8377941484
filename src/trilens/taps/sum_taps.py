"""What a pass does at sums of streams: between two parts of a block the residual is such a sum.

No module gives it, and the block's own code holds it, so that a hook cannot hand on another. The
calls of torch functions are watched instead, in the layers that have an edit or a record there:
they are counted as on the probe (`models/sites/sums.py`), and the sum, or an operand, replaced. So
is what a router's own code projects, where only what it makes of that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trilens.models.sites.sums import is_linear_call, is_stream_sum
from trilens.taps.functions import FunctionCalls
from trilens.taps.hooks import Hooks
from trilens.taps.site_taps import Pass, SiteTaps, Spot

__all__ = ["SumTaps"]

_OPERANDS = ("left", "right")


@dataclass(slots=True)
class _Running:
    """A module that is running, and the products that its own code has made."""

    module: nn.Module
    linears: int = 0


class SumTaps:
    """The edits and records of a pass at sums of streams and at products inside a module."""

    def __init__(self, run: Pass, taps: SiteTaps, d_model: int) -> None:
        self.run = run
        self.taps = taps
        self.d_model = d_model
        self.spots = [s for s in taps.spots if s.tap.event in ("sum", "linear")]
        self.begin()

    def begin(self) -> None:
        """Forget what was counted: another pass begins."""
        self.counts: dict[tuple[int | None, nn.Module], int] = {}
        self.running: list[_Running] = []
        self.sum: tuple[nn.Module, int] | None = None

    def place(self, hooks: Hooks) -> None:
        """Watch sums; to be called after the hooks that begin a block and before those that end
        one."""
        owners = {spot.tap.module for spot in self.spots}
        for module in {inner: None for owner in owners for inner in owner.modules()}:
            hooks.before(module, self._enter(module))
            hooks.after(module, self._leave)
        if owners:
            hooks.enter(FunctionCalls(self._before, self._after).watching())

    def _enter(self, module: nn.Module) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self.run.mine():
                self.running.append(_Running(module))

        return enter

    def _leave(self, *_: Any) -> None:
        if self.run.mine() and self.running:
            self.running.pop()

    def _live(self, parts: tuple[str, ...]) -> list[Spot]:
        if self.sum is None:
            return []
        owner, number = self.sum
        return [
            spot
            for spot in self.spots
            if spot.tap.event == "sum"
            and spot.tap.module is owner
            and spot.tap.order == number
            and spot.tap.part in parts
            and spot.site.layer == self.run.layer
        ]

    def _before(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        self.sum = None
        span = self.run.span
        if not self.running or self.run.layer is None or not self.run.mine():
            return args
        if not is_stream_sum(name, args, options, len(span.lengths), span.seq, self.d_model):
            return args
        owner = self.running[-1].module
        number = self.counts.get((self.run.layer, owner), 0)
        self.counts[self.run.layer, owner] = number + 1
        self.sum = owner, number
        for spot in self._live(_OPERANDS):
            place = _OPERANDS.index(spot.tap.part)
            new = self._at(spot, args[place])
            args = (*args[:place], new, *args[place + 1 :])
        return args

    def _after(self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> Any:
        live = self._live(("",))
        self.sum = None
        for spot in (*live, *self._projected(name, result)):
            result = self._at(spot, result)
        return result

    def _projected(self, name: str, result: Any) -> list[Spot]:
        """The spots at a product that a running module's own code has made."""
        span = self.run.span
        if not self.running or self.run.layer is None or not self.run.mine():
            return []
        if not is_linear_call(name, result, len(span.lengths) * span.seq):
            return []
        running = self.running[-1]
        number, running.linears = running.linears, running.linears + 1
        return [
            spot
            for spot in self.spots
            if spot.tap.event == "linear"
            and spot.tap.module is running.module
            and spot.tap.order == number
            and spot.site.layer == self.run.layer
        ]

    def _at(self, spot: Spot, tensor: Tensor) -> Tensor:
        # An edit calls torch functions too: they are no sums of the model's.
        held, self.running = self.running, []
        try:
            return self.taps.at(spot, tensor)
        finally:
            self.running = held
