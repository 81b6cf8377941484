"""Values of a file, held against the types that the code will take them for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from trilens.io.messages import clip

__all__ = ["checked", "typed"]

T = TypeVar("T")


def typed(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of plain fields, from a file's values by their names.

    Raises:
        TypeError: a field that is missing, one too many, or a value of another type.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise _wrong(name, value, hints[name])
    return cls(**values)


def checked(value: Any, kind: type[T], what: str) -> T:
    """A value of a file that must be of this type.

    Raises:
        TypeError: it is not.
    """
    if not _fits(value, (kind,)):
        raise _wrong(what, value, (kind,))
    return value  # type: ignore[no-any-return]


@cache
def _hints(cls: type) -> dict[str, tuple[type, ...]]:
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(cls).items()}


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    # JSON writes a whole float as an integer; a truth value is no number.
    known = (*kinds, int) if float in kinds else kinds
    return isinstance(value, known) and (bool in kinds or not isinstance(value, bool))


def _wrong(name: str, value: Any, kinds: tuple[type, ...]) -> TypeError:
    words = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
    return TypeError(f"{name} is {clip(value)}, needed is {words}")
