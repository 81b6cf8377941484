"""The one way in which trilens writes a file: beside its place, flushed, renamed.

There is never half a file under a final name. A temporary file has a name of its own,
`.NAME.8-hex-digits.partial`, and its writer holds a lock on it: what a killed run left behind has
no lock, and the next writer of the same name removes it. Where one run alone may write, another
one's lock is a refusal: that of its temporary file, or that of the folder.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trilens.errors import WriteError
from trilens.io.guarded import sha256_of
from trilens.io.messages import reason
from trilens.io.temporary import TRIES, alone_at, create_file, create_folder, lock_folder, sweep

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "AtomicFile",
    "atomic",
    "atomic_folder",
    "locked_folder",
    "write_bytes",
]

_CHUNK_BYTES = 1 << 22


class AtomicFile(io.RawIOBase):
    """A binary file in the making: `commit` gives it its name, `close` alone removes it.

    Args:
        path: its place.
        alone: refuse a place where a file is, or where another run writes one.

    Attributes:
        path: Its place.
        temporary: Where it is until then.

    Raises:
        WriteError: the place is taken by something that is no regular file, or the folder can't
            be written to.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        super().__init__()
        self.path, self._alone = path, alone
        self._file = -1
        try:
            mode = self._check_place()
            sweep(path.parent, of=path)
            self._file, self.temporary = alone_at(path, create_file) if alone else create_file(path)
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
        if self._file < 0:
            return sha256_of(self.path)
        digest, done = hashlib.sha256(), 0
        while part := os.pread(self._file, _CHUNK_BYTES, done):
            digest.update(part)
            done += len(part)
        return digest.hexdigest()

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
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
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

    def flush_to_disk(self) -> None:
        """Have the disk hold what is written so far.

        Raises:
            WriteError: as the system reports.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def commit(self) -> None:
        """Flush to disk, and rename.

        Raises:
            WriteError: as the system reports.
        """
        try:
            os.fsync(self._file)
            self._check_place()  # looked at again: nothing but a regular file is replaced
            self.temporary.replace(self.path)
            os.close(self._file)
            self._file = -1
            _flush(self.path.parent)  # the name too must survive a power cut
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _check_place(self) -> int | None:
        if self._alone and os.path.lexists(self.path):
            raise FileExistsError(errno.EEXIST, "it exists")
        return _mode_of(self.path)

    def close(self) -> None:
        """Remove the file, unless it was committed."""
        if self._file >= 0:
            with suppress(OSError):
                self.temporary.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1
        super().close()


@contextmanager
def atomic(path: Path, *, alone: bool = False) -> Iterator[AtomicFile]:
    """A binary file that gets its name at the end of the block, and is removed on any exception.

    Args:
        path: its place.
        alone: refuse a place where a file is, or where another run writes one.

    Raises:
        WriteError: it can't be written, for whatever reason the system has.
    """
    with AtomicFile(path, alone=alone) as file:
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
    lock, temporary = -1, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, of=path)
        lock, temporary = alone_at(path, create_folder)
        yield temporary
        for inner in (*temporary.iterdir(), temporary):
            _flush(inner)
        temporary.replace(path)
        _flush(path.parent)
    except WriteError as error:  # of a file inside: the folder has another name for its caller
        raise WriteError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


@contextmanager
def locked_folder(path: Path) -> Iterator[bool]:
    """A directory that one run alone writes to; what a killed run left in it is removed.

    Args:
        path: the directory. It is made with its parents where it is missing, and removed again
            where nothing was written to it.

    Yields:
        Whether it was made.

    Raises:
        WriteError: it can't be written, or another run writes to it.
    """
    lock = -1
    is_new = False
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(TRIES):
                with suppress(FileExistsError):
                    path.mkdir()
                    is_new = True
                lock = lock_folder(path)
                if lock >= 0:
                    break
            else:
                raise OSError(errno.ENOENT, "it is a link to nothing, or removed again and again")
            sweep(path)
        except OSError as error:
            raise _cannot_write(path, error) from error
        yield is_new
    finally:
        if lock >= 0:
            if is_new:
                with suppress(OSError):
                    path.rmdir()
            os.close(lock)


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


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _cannot_write(path: Path, error: OSError) -> WriteError:
    why = error.strerror or reason(error)
    return WriteError(f"{path} cannot be written: {why}; name another place, or make room")
