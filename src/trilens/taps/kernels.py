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
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trilens.errors import CaptureError
from trilens.models.gates.kernels import DECODE_KERNELS, KERNEL_GATES, KernelRecord
from trilens.taps.override import CountedOverrides, Functions
from trilens.taps.undo import undone

__all__ = [
    "KERNELS",
    "KernelTap",
    "KernelWatcher",
    "kernel_calls",
    "kernel_places",
]


KernelRun = Callable[[str, Callable[..., Any], Mapping[str, Any]], tuple[Any] | None]
"""What runs a kernel function in the place of the model: its result in a tuple, or None."""


@dataclass(frozen=True, slots=True)
class KernelWatcher:
    """A callback of kernel calls: before each one, and after it with its arguments.

    Attributes:
        enter: called with the function's name.
        leave: called with the name, the arguments by parameter name, and the result.
        edit: called before the function, with the name and the arguments by parameter name,
            defaults included: gives those that the function is called with instead, or the same
            object. `leave` sees what was used.
        run: calls the function in the place of the model, given the name, the function and the
            arguments by parameter name.
    """

    enter: Callable[[str], None]
    leave: Callable[[str, Mapping[str, Any], Any], None]
    edit: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None
    run: KernelRun | None = None


@dataclass(slots=True)
class KernelTap:
    """All current kernel watchers of this process and the replaced globals that serve them."""

    _watchers: dict[int, list[KernelWatcher]] = field(default_factory=dict)
    _overrides: CountedOverrides = field(default_factory=CountedOverrides)

    def __post_init__(self) -> None:
        os.register_at_fork(after_in_child=self._forget_other_threads)

    def _forget_other_threads(self) -> None:
        for thread in self._watchers.keys() - {threading.get_ident()}:
            del self._watchers[thread]

    @contextmanager
    def watch(
        self, places: Iterable[tuple[Functions, str]], watcher: KernelWatcher
    ) -> Iterator[None]:
        """Report every call to the watcher that this thread makes while the block runs.

        Args:
            places: module namespace and function name, from `kernel_places`.
            watcher: called in the thread that opened the block only.
        """
        thread = threading.get_ident()
        with (
            self._overrides.override(list(places), self._wrapper),
            undone(lambda: self._forget(thread, watcher)),
        ):
            self._watchers.setdefault(thread, []).append(watcher)
            yield

    def _forget(self, thread: int, watcher: KernelWatcher) -> None:
        # No other thread's list is touched.
        mine = [other for other in self._watchers.get(thread, ()) if other is not watcher]
        if mine:
            self._watchers[thread] = mine
        else:
            self._watchers.pop(thread, None)

    def _wrapper(self, name: str, original: Callable[..., Any] | None) -> Callable[..., Any]:
        if original is None:
            raise CaptureError(f"function {name} is gone: the model was changed since the probe")
        watchers = self._watchers
        signature = inspect.signature(original)

        @functools.wraps(original)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            mine = tuple(watchers.get(threading.get_ident(), ()))
            for watcher in mine:
                watcher.enter(name)
            editors = [watcher.edit for watcher in mine if watcher.edit is not None]
            if editors:
                args, kwargs = _edited(name, signature, editors, args, kwargs)
            runs = [watcher.run for watcher in mine if watcher.run is not None]
            result = _run(name, original, signature, runs, args, kwargs)
            if mine:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                for watcher in mine:
                    watcher.leave(name, bound.arguments, result)
            return result

        return kernel


def _run(
    name: str,
    original: Callable[..., Any],
    signature: inspect.Signature,
    runs: Iterable[KernelRun],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What the function gives, or what a watcher gives in its place."""
    for run in runs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        found = run(name, original, bound.arguments)
        if found is not None:
            return found[0]
    return original(*args, **kwargs)


def _edited(
    name: str,
    signature: inspect.Signature,
    editors: Iterable[Callable[[str, Mapping[str, Any]], Mapping[str, Any]]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function is called with after edits; what it was called with if none changed it."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    before: Mapping[str, Any] = dict(bound.arguments)
    given = before
    for edit in editors:
        given = edit(name, given)
    if given is before:
        return args, kwargs
    bound.arguments.update(given)
    return bound.args, bound.kwargs


def kernel_places(model: nn.Module, names: Iterable[str]) -> list[tuple[Functions, str]]:
    """Where the files of a model's classes hold functions of the given names."""
    known = tuple(names)
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    found: list[tuple[Functions, str]] = []
    for file in sorted(files):
        namespace = vars(sys.modules[file]) if file in sys.modules else {}
        found += [(namespace, name) for name in known if callable(namespace.get(name))]
    return found


KERNELS = KernelTap()


@contextmanager
def kernel_calls(
    model: nn.Module, names: Iterable[str] | None = None
) -> Iterator[list[KernelRecord]]:
    """The inner values of recurrences, prefill and decoding, while the block runs.

    Args:
        model: whose files hold the functions.
        names: kernel functions; all that are known unless given.

    Yields:
        The calls that this thread makes, in order; the functions are put back when the block ends,
        also after an exception.
    """
    calls: list[KernelRecord] = []

    def leave(name: str, arguments: Mapping[str, Any], result: Any) -> None:
        calls.append(KernelRecord(name, arguments, result))

    known = (*KERNEL_GATES, *DECODE_KERNELS.values())
    places = kernel_places(model, known if names is None else names)
    with KERNELS.watch(places, KernelWatcher(lambda _name: None, leave)):
        yield calls
