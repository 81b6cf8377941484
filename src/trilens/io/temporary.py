"""Temporary files and folders of outputs in the making, and the locks that say whose they are.

The name is `.NAME.8-hex-digits.partial`. Its maker holds a lock on it until it ends: what is not
locked is what a killed run left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = [
    "TRIES",
    "alone_at",
    "create_file",
    "create_folder",
    "is_leftover",
    "lock_folder",
    "sweep",
]

TRIES = 6
"""Of two that begin at once each may see the other: both step back and begin again."""

_ENDING_S = 0.5
_NAME_LIMIT = 48  # characters of at most 4 bytes: a name has room for 255 bytes
_IN_USE = "another run is writing it"
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.partial", re.DOTALL)


def create_file(path: Path) -> tuple[int, Path]:
    """A new file beside its place, locked: its descriptor and where it is."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
        try:
            file = os.open(temporary, flags, 0o666)  # less the umask
        except FileExistsError:
            continue
        with suppress(OSError):  # file systems without locks: nothing is swept there
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, temporary):
            return file, temporary
        os.close(file)  # swept before the lock was held


def create_folder(path: Path) -> tuple[int, Path]:
    """A new folder beside its place, locked: the lock's descriptor and where it is."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
        try:
            temporary.mkdir()
            folder = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, FileNotFoundError):
            if not path.parent.is_dir():
                raise
            continue
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        if _is_at(folder, temporary):
            return folder, temporary
        os.close(folder)


def alone_at(path: Path, create: Callable[[Path], tuple[int, Path]]) -> tuple[int, Path]:
    """Make a temporary file or folder where nobody else has one of the same place.

    Raises:
        OSError: another run holds the lock of its own.
    """
    for _ in range(TRIES):
        lock, temporary = create(path)
        others = [p for p in _leftovers(path.parent, path) if p != temporary]
        if not any(_is_held(other) for other in others):
            return lock, temporary
        with suppress(OSError):
            temporary.rmdir() if temporary.is_dir() else temporary.unlink()
        os.close(lock)
        time.sleep(random.uniform(0.005, 0.05))
    raise OSError(errno.EBUSY, _IN_USE)


def lock_folder(path: Path) -> int:
    """A lock on a folder; −1 where the folder was removed before it was held.

    Raises:
        OSError: another run holds one, or it is no folder.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        _lock_soon(lock)
    except BlockingIOError:
        os.close(lock)
        raise OSError(errno.EBUSY, _IN_USE) from None
    except OSError:
        return lock  # a file system without locks
    if _is_at(lock, path):
        return lock
    os.close(lock)
    return -1


def _lock_soon(file: int) -> None:
    """Take a lock; the one of a run that was killed as it began a process lasts a moment longer."""
    until = time.monotonic() + _ENDING_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def is_leftover(name: str) -> bool:
    """Whether a file of this name is one that a killed run may have left."""
    return _LEFTOVER.fullmatch(name) is not None


def sweep(folder: Path, *, of: Path | None = None) -> None:
    """Remove what killed writers left in a folder: temporary files that nobody locks.

    Args:
        folder: it is not entered deeper.
        of: the place that they were to get; None removes those of all places.
    """
    for leftover in _leftovers(folder, of):
        with suppress(OSError):
            file = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(file).st_mode):
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            finally:
                os.close(file)


def _leftovers(folder: Path, of: Path | None) -> list[Path]:
    found = [path for path in folder.iterdir() if is_leftover(path.name)]
    start = None if of is None else _prefix(of)
    return [p for p in found if start is None or p.name[: -len("01234567.partial")] == start]


def _is_held(temporary: Path) -> bool:
    try:
        file = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file or folder still has this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _prefix(path: Path) -> str:
    name = path.name
    if len(name) > _NAME_LIMIT:  # two long names that begin alike are two places
        name = f"{name[: _NAME_LIMIT - 8]}{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}."
