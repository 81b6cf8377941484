"""A capture's eyes in modules that compute attention in their own code.

Torch functions are watched only while such a module runs, in the thread of the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from torch.overrides import _get_current_function_mode_stack

from trilens.models.anatomy import Anatomy
from trilens.taps.functions import FunctionCalls
from trilens.taps.hooks import Hooks
from trilens.taps.inline.follower import Follower, InlineEditor
from trilens.taps.registry import AttentionCall
from trilens.taps.span import Span
from trilens.taps.undo import undone

__all__ = ["InlineTap", "inline_modules"]


class _Pass(Protocol):
    """What the tap needs to know of the running pass."""

    layer: int | None
    span: Span
    recording: Any

    def mine(self) -> bool:
        """Whether this thread's pass is running."""


def inline_modules(model: nn.Module, anatomy: Anatomy) -> dict[nn.Module, int]:
    """The modules that compute attention themselves, and which of their products gives scores."""
    return {
        model.get_submodule(anatomy.attention[layer]): number
        for layer, number in anatomy.inline.items()
    }


class InlineTap:
    """Reports the attention calls of modules, and lets an editor change them.

    Args:
        run: the session whose passes are watched.
        modules: which modules, and which of their products gives the scores.
        attend: called with each call.
        editor: may change calls.
    """

    def __init__(
        self,
        run: _Pass,
        modules: Mapping[nn.Module, int],
        attend: Callable[[AttentionCall], None],
        editor: InlineEditor | None,
    ) -> None:
        self.run = run
        self.modules = dict(modules)
        self.follower = Follower(lambda call, _number: attend(call), editor, self.modules)
        self.watch = FunctionCalls(self.follower.before, self.follower.after)
        self.watching = False
        self._pass: Any = None

    def place(self, hooks: Hooks) -> None:
        """Hook the modules; to be called between the hooks that begin and end a block."""
        if not self.modules:
            return
        hooks.enter(self._undone())
        for module in self.modules:
            hooks.before(module, self._enter)
            hooks.after(module, self._leave)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        with undone(self._stop):
            yield

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if not self.run.mine() or self.run.layer is None or self.watching:
            return
        if self.run.recording is not self._pass:
            self._pass = self.run.recording
            self.follower.begin(len(self.run.span.lengths), self.run.span.seq)
        self.follower.enter(module)
        self.watching = True
        self.watch.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: Any) -> None:
        if self.run.mine() and self.watching:
            self._stop()
            self.follower.leave()

    def _stop(self) -> None:
        """Watch no more; where an exception left the module, others watch inside no longer."""
        if self.watch in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            self.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.watching = False
