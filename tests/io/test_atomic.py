"""One writer: whole or not at all, whatever is in the way, whoever was killed."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trilens.errors import CorruptFileError, WriteError
from trilens.io.atomic import AtomicFile, atomic, atomic_folder, locked_folder, write_bytes
from trilens.io.guarded import open_regular, read_bytes
from trilens.io.temporary import is_leftover, lock_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_both_forms_give_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert write_bytes(path, b"abc") == hashlib.sha256(b"abc").hexdigest()
    with atomic(path) as file:
        file.write(b"ab")
        assert path.read_bytes() == b"abc"
        file.write(memoryview(b"cd"))
        assert file.tell() == 4
    assert file.sha256 == hashlib.sha256(b"abcd").hexdigest()
    assert (path.read_bytes(), names(tmp_path)) == (b"abcd", ["x"])


def test_bytes_at_offsets_are_hashed_as_they_are(tmp_path: Path) -> None:
    with atomic(tmp_path / "x") as file:
        file.put(b"world", 5)
        file.put(b"hello", 0)
        assert file.get(4, 3) == b"lowo"
        assert file.sha256 == hashlib.sha256(b"helloworld").hexdigest()
    assert file.sha256 == hashlib.sha256(b"helloworld").hexdigest()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
def test_any_exception_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with pytest.raises(WriteError if error is OSError else error), atomic(path) as file:
        file.write(b"new")
        raise error
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["x"])


def test_modes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
        (tmp_path / "new").chmod(0o604)
        write_bytes(tmp_path / "new", b"again")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    finally:
        os.umask(before)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "folder"),
        (os.mkfifo, "pipe"),
        (a_socket, "socket"),
        (lambda path: path.symlink_to("/dev/null"), "device"),
    ],
)
def test_what_is_no_regular_file_stays(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    path = tmp_path / "x"
    make(path)
    before = path.lstat().st_mode
    with pytest.raises(WriteError, match=f"it is a {kind}, not a regular file"):
        write_bytes(path, b"abc")
    assert (path.lstat().st_mode, names(tmp_path)) == (before, ["x"])


def test_links_are_replaced_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, path = tmp_path / "precious", tmp_path / "x"
    precious.write_bytes(b"mine")
    path.symlink_to(precious)
    tokens = iter(["00000000", "11111111"])
    monkeypatch.setattr("trilens.io.temporary.secrets.token_hex", lambda _: next(tokens))
    (tmp_path / ".x.00000000.partial").symlink_to(precious)  # planted where it will be made
    write_bytes(path, b"abc")
    assert (precious.read_bytes(), path.read_bytes()) == (b"mine", b"abc")
    assert not path.is_symlink()


def test_a_missing_folder_and_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No such file"):
        write_bytes(tmp_path / "no" / "x", b"")
    if Path("/dev/full").exists():
        with pytest.raises(WriteError, match="not a regular file"):
            write_bytes(Path("/dev/full"), b"abc")


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_bytes(path, b"abc")
    assert path.read_bytes() == b"abc"


KILLED = """
import os, signal, sys
from pathlib import Path
from trilens.io.atomic import AtomicFile
file = AtomicFile(Path(sys.argv[1]))
file.write(b"half")
print(file.temporary, flush=True)
os.kill(os.getpid(), signal.{signal})
"""


def test_the_next_run_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    code = KILLED.format(signal="SIGKILL")
    done = subprocess.run(
        [sys.executable, "-c", code, path], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.strip())
    assert left.is_file()
    assert is_leftover(left.name)
    assert path.read_bytes() == b"old"
    (tmp_path / ".y.00000000.partial").touch()  # of another file: not ours to remove
    write_bytes(path, b"new")
    assert names(tmp_path) == [".y.00000000.partial", "x"]


def test_a_running_writer_is_not_swept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic(path) as first:
        first.write(b"first")
        write_bytes(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"


def test_writers_in_a_race(tmp_path: Path) -> None:
    path = tmp_path / "x"
    end = time.monotonic() + 0.5

    def write(content: bytes) -> None:
        while time.monotonic() < end:
            write_bytes(path, content)

    contents = [bytes([index]) * 5000 for index in range(4)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while not path.exists():
        pass
    while time.monotonic() < end:
        assert path.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["x"]


def test_without_commit_nothing_stays(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "x")
    file.write(b"abc")
    file.close()
    file.close()
    assert names(tmp_path) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(place) as folder:
        (folder / "a").write_bytes(b"a")
        raise KeyboardInterrupt
    assert names(place.parent) == []
    stale = place.with_name(".out.0123abcd.partial")
    stale.mkdir()
    (stale / "a").touch()
    with atomic_folder(place) as folder:
        (folder / "a").write_bytes(b"a")
        assert not place.exists()
    assert (names(place.parent), names(place)) == (["out"], ["a"])


def test_errors_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match=rf"{tmp_path / 'out' / 'a'} cannot be written"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").mkdir()
        write_bytes(folder / "a", b"")


def test_one_writer_alone(tmp_path: Path) -> None:
    for path in (tmp_path / "x", tmp_path / ("y" * 200)):
        with (
            atomic(path, alone=True),
            pytest.raises(WriteError, match="another run is writing it"),
        ):
            AtomicFile(path, alone=True)
        with pytest.raises(WriteError, match="it exists"):
            AtomicFile(path, alone=True)
        with (
            atomic_folder(path.with_suffix(".d")),
            pytest.raises(WriteError, match="another run is writing it"),
            atomic_folder(path.with_suffix(".d")),
        ):
            pass
        # Places whose names begin alike are two places.
        with atomic(path.with_name(f"{path.name}.z"), alone=True):
            AtomicFile(path.with_name(f"{path.name}.zz"), alone=True).close()


def test_a_lock_that_outlives_its_run_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """As where a run was killed between the fork and the exec of a worker."""
    held = lock_folder(tmp_path)
    release = threading.Timer(0.1, os.close, [held])
    release.start()
    with locked_folder(tmp_path) as is_new:
        assert not is_new
    release.join()


def test_guarded_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abcd")
    assert read_bytes(path, max_bytes=4) == b"abcd"
    with pytest.raises(CorruptFileError, match="at most 3 bytes"):
        read_bytes(path, max_bytes=3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptFileError, match="is no regular file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(CorruptFileError, match="is a folder"):
        read_bytes(tmp_path)
    with pytest.raises(CorruptFileError, match="No such file"):
        read_bytes(tmp_path / "absent")
