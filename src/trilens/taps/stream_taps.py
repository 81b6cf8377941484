"""What a pass does at products of residual streams: their weights stand in the model's own code.

No module shows the weights as they are used. The products are counted as on the probe
(`models/gates/stream_products.py`), inside the modules whose code makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from trilens.models.anatomy import Anatomy
from trilens.models.gates.events import STREAM_FUNCTIONS
from trilens.models.gates.stream_products import holds_streams
from trilens.taps.functions import FunctionCalls
from trilens.taps.hooks import Hooks
from trilens.taps.span import Span

__all__ = ["StreamTaps"]


class _Pass(Protocol):
    """What the taps need to know of the running pass."""

    span: Span

    @property
    def taps(self) -> Mapping[tuple[str, nn.Module | None, str], Any]:
        """What is read, by event, module and function."""

    def mine(self) -> bool:
        """Whether this thread's pass is running."""

    def tapped(self, key: Any, calls: Mapping[str, Any]) -> None:
        """One call of what gates are read at."""


class StreamTaps:
    """The gates of a pass that are operands of products of residual streams."""

    def __init__(self, run: _Pass, anatomy: Anatomy) -> None:
        self.run = run
        self.anatomy = anatomy
        self.keys = {key for key in run.taps if key[0] == "function"}
        self.running: list[nn.Module] = []

    def place(self, hooks: Hooks) -> None:
        """Watch products; to be called after the hooks that begin a block."""
        owners = {key[1] for key in self.keys if key[1] is not None}
        for module in {inner: None for owner in owners for inner in owner.modules()}:
            hooks.before(module, self._enter)
            hooks.after(module, self._leave)
        if owners:
            hooks.enter(FunctionCalls(_unchanged, self._after).watching())

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if self.run.mine():
            self.running.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self.run.mine() and module in self.running:
            while self.running.pop() is not module:
                pass

    def _after(self, name: str, args: tuple[Any, ...], _options: Any, result: Any) -> Any:
        if name not in STREAM_FUNCTIONS or not self.running or not self.run.mine():
            return result
        key = "function", self.running[-1], STREAM_FUNCTIONS[name]
        if key not in self.keys or not all(isinstance(each, Tensor) for each in args[:2]):
            return result
        span, anatomy = self.run.span, self.anatomy
        shape = tuple(result.shape)
        if holds_streams(shape, len(span.lengths), span.seq, anatomy.n_streams, anatomy.d_model):
            self.run.tapped(key, {"tensors": args[:2], "x": args[0]})
        return result


def _unchanged(_name: str, args: tuple[Any, ...], _options: Any) -> tuple[Any, ...]:
    return args
