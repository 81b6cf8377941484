"""Children of one process that has everything imported: started at once, killed at a call."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trilens.errors import TrilensError

__all__ = ["CALLS", "REFUSED", "RIGHT", "child", "counted", "import_all", "prepared", "wait"]

RIGHT, REFUSED, BROKEN = 0, 2, 70

CALLS = (
    "open", "write", "pwrite", "pread", "fsync", "fchmod", "ftruncate", "replace", "rename", "link",
    "unlink", "remove", "mkdir", "rmdir",
)  # fmt: skip
"""The calls of `os` that change a file system, or look at what was written."""


def child(work: Callable[[], object], *, before: Callable[[], object] | None = None) -> int:
    """Fork a child that does some work, and ends as it went: right, refused by name, or broken."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = BROKEN
    leave = os._exit
    try:
        if before is not None:
            before()
        work()
        code = RIGHT
    except TrilensError as error:
        code = REFUSED
        sys.stderr.write(f"refused: {error}\n")
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        leave(code)
    raise AssertionError


def prepared(work: Callable[[], object], names: Path) -> int:
    """Have a child do some work, and import here what it imported; its exit code.

    Later children need not: imports are most of the time of small work. Done here instead, the work
    might start threads, which no fork survives.

    Args:
        names: a file for the names of its modules.
    """

    def noted() -> None:
        work()
        names.write_text("\n".join(sys.modules))

    code = wait(child(noted))
    import_all(names.read_text().splitlines() if code == RIGHT else ())
    return code


def import_all(names: Iterable[str]) -> None:
    """Import these modules, as far as they can be: some are made by others."""
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


def wait(number: int) -> int:
    """The exit code of a child; −9 of one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def counted(at: int, *, after: bool, report: Callable[[int], object] | None = None) -> None:
    """From now on kill this process before or after its n-th call that changes files.

    Args:
        at: n; 0 never kills.
        after: the call is made before the end.
        report: told of each call's number.
    """
    count = 0
    opening = os.open

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if real is opening and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            count += 1
            mine = count
            if report is not None:
                report(mine)
            if mine == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*arguments, **options)
            if mine == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
