"""Seeded fuzzing of every input: damaged files in, a named error or a sound result out.

A target makes a whole input once, and reads damaged ones many times. Reading may raise a
`TrilensError` and nothing else; what it accepts must then be of use. No input may take longer than
10 s of the processor (beside other work by the clock six times that), nor memory beyond twice its
size and 200 MB.
"""

from __future__ import annotations

import random
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilens.errors import TrilensError

__all__ = ["Finding", "Target", "run_inputs", "within"]

_SECONDS = 10
_BESIDE = 6  # times as long by the clock, on a machine that does much else
_SPARE_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class Target:
    """One input format and its reader.

    Attributes:
        make: writes a whole input into a folder, and gives what `damage` needs.
        damage: writes a damaged input beside it; returns what `read` takes.
        read: reads it, and uses what was accepted.
        few: inputs of a normal run.
        many: inputs of a hostile one.
    """

    make: Callable[[Path], Any]
    damage: Callable[[random.Random, Any, Path], Any]
    read: Callable[[Any], None]
    few: int
    many: int


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that broke a promise: its seed makes it again."""

    seed: int
    problem: str

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.problem}"


class _TooSlow(BaseException):
    """Not an `Exception`, so that no handler takes it for a damaged file."""


def run_inputs(target: Target, seeds: range, folder: Path) -> tuple[list[Finding], int]:
    """Read one damaged input for each seed.

    Returns:
        What went wrong, and how many inputs were refused.
    """
    base = folder / "base"
    base.mkdir()
    whole = target.make(base)
    findings, refused = [], 0
    for seed in seeds:
        place = folder / "input"
        rng = random.Random(seed)
        given = target.damage(rng, whole, place)
        size = _size_bytes(place)
        _reset_peak()
        before = _memory_bytes("VmRSS")
        problem = None
        started = time.process_time()
        try:
            with within(_SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(given)
        except TrilensError as error:
            refused += 1
            problem = None if str(error).strip() else "an error without a message"
        except _TooSlow:
            problem = f"more than {_SECONDS} s, at {''.join(traceback.format_exc(limit=-3))}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = "".join(traceback.format_exception(error, limit=-4))[-1500:]
        took = time.process_time() - started
        peak = _memory_bytes("VmHWM") - before
        if problem is None and took > _SECONDS:
            problem = f"{took:.1f} s"
        if problem is None and peak > 2 * size + _SPARE_BYTES:
            problem = f"{peak} bytes of memory for an input of {size} bytes"
        if problem is not None:
            findings.append(Finding(seed, problem))
    return findings, refused


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise what no handler takes for a damaged file where it takes longer of the processor."""

    def stop(*_: Any) -> None:
        raise _TooSlow

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, stop) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _BESIDE * seconds)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _size_bytes(place: Path) -> int:
    if place.is_dir():
        return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return place.stat().st_size if place.exists() else 0


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory_bytes(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
