"""The fuzzer can fail: readers that break each promise are found out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile.fuzz import Target, run_inputs
from trilens.errors import CorruptFileError


def good(data: bytes) -> None:
    raise CorruptFileError("damaged")


def raises(data: bytes) -> None:
    raise ValueError("not ours")


def says_nothing(data: bytes) -> None:
    raise CorruptFileError(" ")


def allocates(data: bytes) -> None:
    bytearray(b"x" * 250_000_000)


def sleeps(data: bytes) -> None:
    time.sleep(20)


def computes(data: bytes) -> None:
    while True:
        pass


def ends(data: bytes) -> None:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (raises, "ValueError: not ours"),
        (says_nothing, "an error without a message"),
        (allocates, "bytes of memory for an input of"),
        (sleeps, "more than 1 s"),
        (computes, "more than 1 s"),
        (ends, "SystemExit"),
    ],
)
def test_a_reader_that_breaks_a_promise_is_found(
    bad: Callable[[bytes], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad in {sleeps, computes}:  # the others may take their time on a slow machine
        monkeypatch.setattr("hostile.fuzz._SECONDS", 1)
    if bad is sleeps:
        monkeypatch.setattr("hostile.fuzz._BESIDE", 1)

    def damage(rng: random.Random, whole: bytes, place: Path) -> bytes:
        place.write_bytes(whole)
        return whole[rng.randrange(2) :]

    def read(data: bytes) -> None:
        (bad if len(data) == 7 else good)(data)

    target = Target(lambda _: b"1234567", damage, read, 1, 1)
    bad_seeds = [seed for seed in range(8) if random.Random(seed).randrange(2) == 0]
    some = range(bad_seeds[0] + 1, bad_seeds[1] + 1)
    findings, refused = run_inputs(target, some, tmp_path)
    assert [each.seed for each in findings] == [bad_seeds[1]]
    assert words in findings[0].problem
    assert str(findings[0]).startswith(f"seed {bad_seeds[1]}: ")
    assert refused >= len(some) - 1
