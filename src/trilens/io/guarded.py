"""The one way in which trilens opens a file that somebody else may have written."""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trilens.errors import CorruptFileError, TrilensError

__all__ = [
    "SIZE_LIMIT_BYTES",
    "OpenFile",
    "Scratch",
    "Stamp",
    "check_link",
    "open_regular",
    "read_bytes",
    "sha256_of",
]

SIZE_LIMIT_BYTES = 100_000_000
"""The longest file that is read whole: configurations, manifests, tokenizers, licences."""


def open_regular(path: Path, error: type[TrilensError] = CorruptFileError) -> BufferedReader:
    """Open a regular file for reading; a pipe or a device is refused and never waited for.

    Raises:
        TrilensError: of the class `error`, when it is missing, unreadable or no regular file.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe waits for its writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as cause:
        why = getattr(cause, "strerror", None) or cause
        raise error(f"{path} cannot be read: {why}") from cause
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        kind = "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
        raise error(f"{path} cannot be read: it {kind}")
    return os.fdopen(file, "rb")


def read_bytes(
    path: Path,
    error: type[TrilensError] = CorruptFileError,
    *,
    max_bytes: int | None = SIZE_LIMIT_BYTES,
) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file.
        error: the class to raise.
        max_bytes: refuse a file that is longer; no more than this is read. None is no limit.

    Raises:
        TrilensError: of the class `error`; as `open_regular`, or too long.
    """
    with open_regular(path, error) as file:
        try:
            size_bytes = os.fstat(file.fileno()).st_size
            if max_bytes is None:
                return file.read()
            # A file that grows while it is read is not followed.
            data = file.read(max_bytes + 1) if size_bytes <= max_bytes else b""
        except OSError as cause:
            raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    if max(size_bytes, len(data)) > max_bytes:
        raise error(f"{path} is too long: at most {max_bytes} bytes are read, it has {size_bytes}")
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


def check_link(path: Path) -> None:
    """Refuse a link out of its folder; the hub's cache links snapshots to its own blobs.

    Raises:
        CorruptFileError: the link leads elsewhere.
    """
    if not path.is_symlink():
        return
    target, home = path.resolve(), path.parent.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in homes):
        raise CorruptFileError(
            f"{path} is a link that leads out of the checkpoint, to {target}: "
            "put the file itself there, or give the directory that holds it"
        )


@dataclass(frozen=True, slots=True)
class Stamp:
    """What shows that a file was replaced or written to."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The stamp of a file as it is now.

        Raises:
            CorruptFileError: it is not there.
        """
        try:
            found = path.stat()
        except OSError as cause:
            raise CorruptFileError(f"{path} cannot be read: {cause.strerror or cause}") from cause
        times = found.st_mtime_ns, found.st_ctime_ns
        return cls(found.st_dev, found.st_ino, found.st_size, *times)


class Scratch:
    """Memory for one read after another, as large as the largest of them.

    One for all files of a checkpoint: one a file would grow with the checkpoint.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """Shapes: → [size_bytes], the same memory each time."""
        if self._memory.size < size_bytes:
            self._memory = np.empty(size_bytes, dtype=np.uint8)
        return self._memory[:size_bytes]


class OpenFile:
    """A file's bytes, read where they are asked for: a file that is cut off meanwhile is an error.

    Raises:
        CorruptFileError: it cannot be read, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream:
            self._file = os.dup(stream.fileno())
        weakref.finalize(self, os.close, self._file)

    @property
    def size_bytes(self) -> int:
        """Its size now."""
        return os.fstat(self._file).st_size

    def bytes(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes of the file, in memory of their own.

        Shapes: → [end − begin]

        Raises:
            CorruptFileError: the file ends before.
        """
        found = np.empty(end - begin, dtype=np.uint8)
        self.fill(found, begin)
        return found

    def borrow(self, begin: int, end: int, scratch: Scratch) -> NDArray[np.uint8]:
        """As `bytes`, in memory that whoever has the same scratch uses again.

        Shapes: → [end − begin]

        Raises:
            CorruptFileError: the file ends before.
        """
        found = scratch.take(end - begin)
        self.fill(found, begin)
        return found

    def fill(self, found: NDArray[np.uint8], begin: int) -> None:
        """Read into memory of the caller's, contiguous and as long as what is read.

        Raises:
            CorruptFileError: the file ends before.
        """
        view = found.data
        done = 0
        while done < len(view):
            try:
                n = os.preadv(self._file, [view[done:]], begin + done)
            except OSError as cause:
                why = cause.strerror or cause
                raise CorruptFileError(f"{self.path} cannot be read: {why}") from cause
            if n == 0:
                raise CorruptFileError(
                    f"{self.path} was cut off while it was read: it ends at byte {begin + done}"
                )
            done += n
