"""A caller's path, checked before the system is asked: its refusals have no name of ours."""

from __future__ import annotations

import os
from pathlib import Path

from trilens.errors import UsageError
from trilens.io.messages import clip

__all__ = ["as_path"]

_NAME_BYTES = 255
_PATH_BYTES = 4095


def as_path(path: str | os.PathLike[str], what: str = "path") -> Path:
    """A path that a file system can have.

    Args:
        path: as it was given.
        what: what errors call it.

    Raises:
        UsageError: no path, empty, or with a zero byte, a lone surrogate, or a name that is too
            long.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise UsageError(f"{what} is {clip(path)}: give the path of a file or folder")
    if "\0" in text:
        raise UsageError(f"{what} {clip(text)} holds a zero byte: no file system has such a path")
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError as cause:
        raise UsageError(
            f"{what} {clip(text)} is not valid Unicode: replace character {cause.start}"
        ) from cause
    longest = max(map(len, raw.split(os.sep.encode())))
    if longest > _NAME_BYTES or len(raw) > _PATH_BYTES:
        raise UsageError(
            f"{what} {clip(text)} is too long: names of at most {_NAME_BYTES} bytes are allowed, "
            f"{_PATH_BYTES} in all; it has {longest} and {len(raw)}"
        )
    return Path(text)
