"""Tensors in a nest of tuples, lists and mappings: told apart by their paths, replaced, compared.

What a block takes and hands on is such a nest. Mappings and lists that a block is given may also be
written into: what it leaves there is handed on as much as what it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Path", "Writes", "containers", "leaves", "replaced", "written"]

Path = tuple[Any, ...]
"""Keys and positions, from the outside in."""

_DEEP = 6


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in a nest, each with its path, in order."""
    if isinstance(value, Tensor):
        yield path, value
    elif len(path) < _DEEP:
        for key, item in _items(value):
            yield from leaves(item, (*path, key))


def replaced(value: Any, by: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """The same nest with other tensors at some paths; new containers, all else by reference."""
    if isinstance(value, Tensor):
        return by.get(path, value)
    if len(path) >= _DEEP:
        return value
    if isinstance(value, tuple):
        items = [replaced(item, by, (*path, i)) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [replaced(item, by, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, item in value.items():
            new[key] = replaced(item, by, (*path, key))
        return new
    return value


def containers(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What a callee may write into, each with its path: mappings and lists."""
    if isinstance(value, MutableMapping | list):
        yield path, value
    if not isinstance(value, Tensor) and len(path) < _DEEP:
        for key, item in _items(value):
            yield from containers(item, (*path, key))


@dataclass(frozen=True, slots=True)
class Writes:
    """What was written into the containers of a nest: for each the new items by their keys."""

    items: tuple[tuple[Path, dict[Any, Any]], ...] = ()

    def put(self, into: Any, by: Mapping[Path, Tensor]) -> None:
        """Write the same into another nest of the same form.

        Args:
            into: the nest.
            by: tensors in place of those that were written, by their path in `items`.
        """
        for number, (path, new) in enumerate(self.items):
            held = into
            for key in path:
                held = held[key]
            for key, item in new.items():
                value = replaced(item, by, (number, 1, key))
                if isinstance(held, list) and key >= len(held):
                    held.append(value)
                else:
                    held[key] = value


def written(before: Mapping[Path, dict[Any, Any]], after: Any) -> Writes:
    """What stands in the containers of a nest that did not stand there before.

    Args:
        before: the items of each container, by path, as they were.
        after: the nest now.
    """
    found = []
    for path, held in containers(after):
        old = before.get(path)
        if old is None:
            continue  # itself new: an item of what holds it
        new = {key: item for key, item in _items(held) if key not in old or old[key] is not item}
        if new:
            found.append((path, new))
    return Writes(tuple(found))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, tuple | list) else []
