"""The kernel tap: functions that recurrent layers call by module-global name, watched.

A recurrent mixer's inner values (dt, decay, β, q, k, v) are arguments of one function, called by
the name that the model's file gives it. transformers substitutes these functions only through the
optional `kernels` package, once per process and never back, so the tap replaces the global itself:
under a lock, counted, and put back when the last watcher goes. Calls of threads that nobody
watches pass straight through.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["KERNELS", "KernelTap", "KernelWatcher", "kernel_places"]

Namespace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class KernelWatcher:
    """Who is told of kernel calls: before each one, and after it with its arguments.

    Attributes:
        enter: called with the function's name.
        leave: called with the name, the arguments by parameter name, and the result.
    """

    enter: Callable[[str], None]
    leave: Callable[[str, Mapping[str, Any], Any], None]


@dataclass(slots=True)
class _Override:
    """One replaced global while somebody watches."""

    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    count: int = 0


@dataclass(slots=True)
class KernelTap:
    """All current kernel watchers of this process and the replaced globals that serve them."""

    _guard: threading.Lock = field(default_factory=threading.Lock)
    _watchers: dict[int, list[KernelWatcher]] = field(default_factory=dict)
    _overrides: dict[tuple[int, str], _Override] = field(default_factory=dict)

    @contextmanager
    def watch(
        self, places: Iterable[tuple[Namespace, str]], watcher: KernelWatcher
    ) -> Iterator[None]:
        """Tell the watcher of every call that this thread makes while the block runs.

        Args:
            places: module namespace and function name, from `kernel_places`.
            watcher: called in the thread that opened the block only.
        """
        thread = threading.get_ident()
        with ExitStack() as stack:
            for namespace, name in places:
                stack.enter_context(self._override(namespace, name))
            with self._guard:
                self._watchers.setdefault(thread, []).append(watcher)
            try:
                yield
            finally:
                with self._guard:
                    mine = self._watchers[thread]
                    mine.remove(watcher)
                    if not mine:
                        del self._watchers[thread]

    @contextmanager
    def _override(self, namespace: Namespace, name: str) -> Iterator[None]:
        key = id(namespace), name
        with self._guard:
            state = self._overrides.get(key)
            if state is None:
                original = namespace[name]
                state = _Override(original, self._wrapper(name, original))
                self._overrides[key] = state
                namespace[name] = state.wrapper
            state.count += 1
        try:
            yield
        finally:
            with self._guard:
                state.count -= 1
                if state.count == 0:
                    del self._overrides[key]
                    # Somebody else's replacement, made meanwhile, is not ours to undo.
                    if namespace[name] is state.wrapper:
                        namespace[name] = state.original

    def _wrapper(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        watchers = self._watchers
        signature = inspect.signature(original)

        @functools.wraps(original)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            mine = tuple(watchers.get(threading.get_ident(), ()))
            for watcher in mine:
                watcher.enter(name)
            result = original(*args, **kwargs)
            if mine:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                for watcher in mine:
                    watcher.leave(name, bound.arguments, result)
            return result

        return kernel


def kernel_places(model: nn.Module, names: Iterable[str]) -> list[tuple[Namespace, str]]:
    """Where the files of a model's classes hold functions of the given names."""
    wanted = tuple(names)
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    found = []
    for file in sorted(files):
        namespace = vars(sys.modules[file]) if file in sys.modules else {}
        found += [(namespace, name) for name in wanted if callable(namespace.get(name))]
    return found


KERNELS = KernelTap()
