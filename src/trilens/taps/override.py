"""Functions of this process replaced while somebody uses the replacement, and put back afterwards.

A replacement is made for the first user and undone after the last one, also after an exception.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CountedOverrides", "Functions"]

Functions = MutableMapping[str, Callable[..., Any]]
"""Functions by name: the namespace of a module, or a registry."""


@dataclass(slots=True)
class _Override:
    """One replaced function while somebody uses its replacement."""

    restore: Callable[[], None]
    count: int = 0


@dataclass(slots=True)
class CountedOverrides:
    """The functions that are replaced now.

    Attributes:
        guard: held while a function is replaced or put back.
        active: by namespace and name.
    """

    guard: threading.Lock = field(default_factory=threading.Lock)
    active: dict[tuple[int, str], _Override] = field(default_factory=dict)

    @contextmanager
    def override(
        self,
        functions: Functions,
        name: str,
        wrap: Callable[[str, Callable[..., Any] | None], Callable[..., Any]],
    ) -> Iterator[None]:
        """Replace a function for the length of the block, or share a replacement that stands.

        Args:
            functions: where it is looked up.
            name: its name there; one that is missing is added, and removed again.
            wrap: makes the replacement from the name and the original.
        """
        key = id(functions), name
        with self.guard:
            state = self.active.get(key)
            if state is None:
                wrapper = wrap(name, functions.get(name))
                state = _Override(_restoring(functions, name, wrapper))
                functions[name] = wrapper
                self.active[key] = state
            state.count += 1
        try:
            yield
        finally:
            with self.guard:
                state.count -= 1
                if state.count == 0:
                    del self.active[key]
                    state.restore()


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
