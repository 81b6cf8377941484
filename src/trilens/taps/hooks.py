"""Hooks of ours on a model's modules: they go when their block ends, and are dead if one stays.

Between torch's registering a hook and the line that stores its handle, Ctrl-C may fall. So a hook
knows the set that it belongs to and does nothing once that is closed; the set knows on which
module it is placing a hook; and whoever runs or hooks a model next removes what earlier sets left.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager, contextmanager
from inspect import CO_GENERATOR
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from trilens.errors import CaptureError
from trilens.taps.undo import undone

__all__ = ["Hooks", "hooked"]


class _Hook:
    """A hook of a set, which does nothing once the set is closed."""

    def __init__(self, hooks: Hooks, call: Callable[..., Any]) -> None:
        self.hooks = hooks
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return None if self.hooks.closed else self.call(*arguments)


class Hooks:
    """The hooks of one block on one model.

    Attributes:
        model: the model.
        thread: the thread that opened the block.
        closed: the block has ended; no hook does anything.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.thread = threading.get_ident()
        self.closed = False
        self._opener: FrameType | None = next(frame for frame in _stack() if _opens(frame))
        self._handles: list[RemovableHandle] = []
        self._placing: nn.Module | None = None
        self._entered: list[_GeneratorContextManager[Any]] = []

    def before(
        self, module: nn.Module, call: Callable[..., Any], *, with_kwargs: bool = False
    ) -> None:
        """Have `call` called before a module's forward, as torch calls its hooks.

        What it returns, if it is not None, is what the module gets instead.
        """
        self._placing = module
        hook = _Hook(self, call)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        self._placing = None

    def after(
        self, module: nn.Module, call: Callable[..., Any], *, with_kwargs: bool = False
    ) -> None:
        """Have `call` called after a module's forward, as torch calls its hooks.

        What it returns, if it is not None, is what the module gives instead.
        """
        self._placing = module
        hook = _Hook(self, call)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        self._placing = None

    def enter(self, block: _GeneratorContextManager[Any]) -> None:
        """Enter a block that ends with the hooks, whatever way they end."""
        self._entered.append(block)
        block.__enter__()

    def running(self) -> bool:
        """Whether the block is still to end, in this thread.

        It may have been left without being closed: where Ctrl-C falls before the first line of an
        ``__exit__``, and the traceback that is shown holds on to it.
        """
        return not self.closed and any(frame is self._opener for frame in _stack())

    def end_if_left(self, *_: Any) -> None:
        """Before a pass: take the hooks away if their block was left without being closed."""
        if self.thread == threading.get_ident() and not self.running():
            self.remove()

    def remove(self) -> None:
        """Close the set and take its hooks away; may be called twice."""
        self.closed = True
        for block in reversed(self._entered):
            block.gen.close()
        for handle in self._handles:
            handle.remove()
        if self._placing is not None:
            for placed in (self._placing._forward_pre_hooks, self._placing._forward_hooks):
                for number, hook in list(placed.items()):
                    if isinstance(hook, _Hook) and hook.hooks is self:
                        placed.pop(number, None)
        _SETS.discard(self)
        self._entered.clear()
        self._handles.clear()
        self._placing = self._opener = None


# Those that are not removed yet. A set of them is changed in one step of the interpreter.
_SETS: set[Hooks] = set()


@contextmanager
def hooked(model: nn.Module) -> Iterator[Hooks]:
    """Hooks on a model for the length of the block; those that a killed block left are removed.

    Raises:
        CaptureError: this thread has hooks of ours on the model already.
    """
    mine = threading.get_ident()
    for hooks in list(_SETS):
        if hooks.closed:
            hooks.remove()
        hooks.end_if_left()
    if any(hooks.thread == mine and _share(hooks.model, model) for hooks in list(_SETS)):
        raise CaptureError(
            f"{_name(model)} is being captured or probed by this thread: a capture was begun "
            "inside another of the same model, from a hook or a callback; let the first one end, "
            "or load the model a second time"
        )
    hooks = Hooks(model)
    with undone(hooks.remove):
        _SETS.add(hooks)
        for entrance in {model, getattr(model, "base_model", model)}:
            hooks.before(entrance, hooks.end_if_left)
        yield hooks


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _opens(frame: FrameType) -> bool:
    """Whether a block belongs to a frame: not to ours, nor to a generator.

    A generator waits beside the stack while the block that it was made for runs.
    """
    module = frame.f_globals.get("__name__", "")
    is_ours = module == "contextlib" or module.startswith("trilens.taps.")
    return not is_ours and not frame.f_code.co_flags & CO_GENERATOR


def _share(one: nn.Module, other: nn.Module) -> bool:
    if one is other:
        return True
    return any(module is other for module in one.modules()) or any(
        module is one for module in other.modules()
    )


def _name(model: nn.Module) -> str:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} {path}" if path else type(model).__name__


def _end_those_of_other_threads() -> None:
    """A forked process has one thread: what the others had begun never ends there."""
    for hooks in list(_SETS):
        if hooks.thread != threading.get_ident():
            hooks.remove()


os.register_at_fork(after_in_child=_end_those_of_other_threads)
