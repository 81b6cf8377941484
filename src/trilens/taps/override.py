"""Functions of this process replaced while somebody uses the replacement, and put back afterwards.

A replacement is made for the first user and undone after the last one, also after an exception.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trilens.taps.undo import undone

__all__ = ["CountedOverrides", "Functions"]

Functions = MutableMapping[str, Callable[..., Any]]
"""Functions by name: the namespace of a module, or a registry."""
Wrap = Callable[[str, Callable[..., Any] | None], Callable[..., Any]]


@dataclass(slots=True, eq=False)
class _User:
    """One block that uses replacements, in one thread."""

    thread: int = field(default_factory=threading.get_ident)


@dataclass(slots=True)
class _Override:
    """One replaced function while somebody uses its replacement."""

    restore: Callable[[], None]
    users: set[_User]


@dataclass(slots=True)
class CountedOverrides:
    """The functions that are replaced now.

    Attributes:
        guard: held while a function is replaced or put back.
        active: by namespace and name.
    """

    # Re-entrant: a block that was dropped is undone wherever memory is collected.
    guard: threading.RLock = field(default_factory=threading.RLock)
    active: dict[tuple[int, str], _Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.register_at_fork(after_in_child=self._forget)

    @contextmanager
    def override(self, places: list[tuple[Functions, str]], wrap: Wrap) -> Iterator[None]:
        """Replace functions for the length of the block, or share replacements that stand.

        Args:
            places: where each is looked up, and its name there; one that is missing is added, and
                removed again.
            wrap: makes the replacement from the name and the original.
        """
        user = _User()
        with undone(lambda: self._leave({user})):
            for functions, name in places:
                self._replace(functions, name, wrap, user)
            yield

    def _replace(self, functions: Functions, name: str, wrap: Wrap, user: _User) -> None:
        key = id(functions), name
        with self.guard:
            state = self.active.get(key)
            if state is None:
                wrapper = wrap(name, functions.get(name))
                self.active[key] = _Override(_restoring(functions, name, wrapper), {user})
                functions[name] = wrapper
            else:
                state.users.add(user)

    def _leave(self, users: set[_User]) -> None:
        with self.guard:
            for key, state in list(self.active.items()):
                state.users -= users
                if not state.users:
                    state.restore()
                    del self.active[key]

    def _forget(self) -> None:
        """In a forked process: what threads that are not there have replaced is put back."""
        self.guard = threading.RLock()
        users = {user for state in self.active.values() for user in state.users}
        self._leave({user for user in users if user.thread != threading.get_ident()})


def _restoring(functions: Functions, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    # A registry of transformers lays its own entries over those of its class.
    original = getattr(functions, "_local_mapping", functions).get(name)

    def restore() -> None:
        # Somebody else's replacement, made meanwhile, is not ours to undo.
        if functions.get(name) is not wrapper:
            return
        if original is None:
            del functions[name]
        else:
            functions[name] = original

    return restore
