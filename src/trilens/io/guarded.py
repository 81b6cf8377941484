"""The one way in which trilens opens a file that somebody else may have written."""

from __future__ import annotations

import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

from trilens.errors import CorruptFileError, TrilensError

__all__ = ["open_regular", "read_bytes", "sha256_of"]


def open_regular(path: Path, error: type[TrilensError] = CorruptFileError) -> BufferedReader:
    """Open a regular file for reading; a pipe or a device is refused and never waited for.

    Raises:
        TrilensError: of the class `error`, when it is missing, unreadable or no regular file.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for its writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        kind = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        raise error(f"{path} cannot be read: it {kind}")
    return os.fdopen(file, "rb")


def read_bytes(
    path: Path, error: type[TrilensError] = CorruptFileError, *, max_bytes: int | None = None
) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file.
        error: the class to raise.
        max_bytes: refuse a file that is longer; no more than this is read.

    Raises:
        TrilensError: of the class `error`; as `open_regular`, or too long.
    """
    with open_regular(path, error) as file:
        try:
            data = file.read() if max_bytes is None else file.read(max_bytes + 1)
        except OSError as cause:
            raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    if max_bytes is not None and len(data) > max_bytes:
        raise error(f"{path} is too long: at most {max_bytes} bytes are read")
    return data


def sha256_of(path: Path) -> str:
    """Hash of a file's content.

    Raises:
        CorruptFileError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as cause:
            raise CorruptFileError(f"{path} cannot be read: {cause.strerror or cause}") from cause
