"""The one way in which trilens writes a file: beside its place, flushed, renamed.

There is never half a file under a final name. A temporary file has a name of its own,
`.NAME.8-hex-digits.partial`, and its writer holds a lock on it: what a killed run left behind has
no lock, and the next writer of the same name removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trilens.errors import WriteError
from trilens.io.guarded import sha256_of
from trilens.io.messages import reason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["AtomicFile", "atomic", "atomic_folder", "is_leftover", "sweep", "write_bytes"]

_NAME_LIMIT = 48  # characters of at most 4 bytes: a name has room for 255 bytes
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.partial", re.DOTALL)


class AtomicFile(io.RawIOBase):
    """A binary file in the making: `commit` gives it its name, `close` alone removes it.

    Args:
        path: its place.

    Attributes:
        path: Its place.
        temporary: Where it is until then.

    Raises:
        WriteError: the place is taken by something that is no regular file, or the folder can't
            be written to.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file = -1
        try:
            mode = _mode_of(path)
            sweep(path.parent, _prefix(path))
            self._file, self.temporary = _create(path)
            if mode is not None:
                os.fchmod(self._file, mode)
        except OSError as error:
            self.close()
            raise _cannot_write(path, error) from error
        self._hash = hashlib.sha256()
        self._is_hashed_whole = True

    @property
    def sha256(self) -> str:
        """Hash of the content so far; read back from the disk where `put` wrote in between."""
        if self._is_hashed_whole:
            return self._hash.hexdigest()
        return sha256_of(self.temporary if self._file >= 0 else self.path)

    def writable(self) -> bool:
        """A file that can be written."""
        return True

    def seekable(self) -> bool:
        """Writing is one way; `put` writes elsewhere."""
        return False

    def tell(self) -> int:
        """Bytes written so far."""
        return os.lseek(self._file, 0, os.SEEK_CUR)

    def write(self, data: ReadableBuffer, /) -> int:
        """Append all bytes, and hash them.

        Raises:
            WriteError: no space.
        """
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.write(self._file, view[done:])
            except OSError as error:
                raise _cannot_write(self.path, error) from error
        self._hash.update(view)
        return done

    def put(self, data: bytes, offset: int) -> None:
        """Write bytes at an offset; several threads may.

        Raises:
            WriteError: no space.
        """
        self._is_hashed_whole = False
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file, data[done:], offset + done)
            except OSError as error:
                raise _cannot_write(self.path, error) from error

    def get(self, size: int, offset: int) -> bytes:
        """Bytes as the file now holds them."""
        return os.pread(self._file, size, offset)

    def commit(self) -> None:
        """Flush to disk, and rename.

        Raises:
            WriteError: as the system reports.
        """
        try:
            os.fsync(self._file)
            _mode_of(self.path)  # looked at again: nothing but a regular file is replaced
            self.temporary.replace(self.path)
            os.close(self._file)
            self._file = -1
            _flush(self.path.parent)  # the name too must survive a power cut
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Remove the file, unless it was committed."""
        if self._file >= 0:
            with suppress(OSError):
                self.temporary.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1
        super().close()


@contextmanager
def atomic(path: Path) -> Iterator[AtomicFile]:
    """A binary file that gets its name at the end of the block, and is removed on any exception.

    Raises:
        WriteError: it can't be written, for whatever reason the system has.
    """
    with AtomicFile(path) as file:
        try:
            yield file
        except OSError as error:
            raise _cannot_write(path, error) from error
        file.commit()


def write_bytes(path: Path, data: ReadableBuffer) -> str:
    """Write a file whole or not at all, and give the hash of its content.

    Raises:
        WriteError: it can't be written.
    """
    with AtomicFile(path) as file:
        file.write(data)
        file.commit()
    return file.sha256


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A directory that gets its name at the end of the block, and is removed on any exception.

    Args:
        path: its place: nothing, or an empty directory. Missing parents are made.

    Raises:
        WriteError: it can't be written.
    """
    lock = -1
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, _prefix(path))
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield temporary
        for inner in (*temporary.iterdir(), temporary):
            _flush(inner)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is one that a killed run may have left."""
    return _LEFTOVER.fullmatch(name) is not None


def sweep(folder: Path, start: str = ".") -> None:
    """Remove what killed writers left in a folder: temporary files that nobody locks.

    Args:
        folder: it is not entered deeper.
        start: of their names.
    """
    for leftover in folder.iterdir():
        if not leftover.name.startswith(start) or not is_leftover(leftover.name):
            continue
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


def _mode_of(path: Path) -> int | None:
    """The mode of the file that is to be replaced; None where there is none.

    Raises:
        OSError: the place holds something that no rename may replace.
    """
    try:
        found = path.stat().st_mode  # through links: /dev/stdout is one
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(found), "device")
        raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file")
    return stat.S_IMODE(found)


def _create(path: Path) -> tuple[int, Path]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}.partial")
        try:
            file = os.open(temporary, flags, 0o666)  # less the umask
        except FileExistsError:
            continue
        with suppress(OSError):  # file systems without locks: nothing is swept there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file, temporary
        os.close(file)  # swept before the lock was held


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _prefix(path: Path) -> str:
    return f".{path.name[:_NAME_LIMIT]}."


def _cannot_write(path: Path, error: OSError) -> WriteError:
    why = error.strerror or reason(error)
    return WriteError(f"{path} cannot be written: {why}; name another place, or make room")
