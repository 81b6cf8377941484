"""Kill `ternarize` and `capture` at random moments: the same command then gives the same bytes.

    python -m hostile.moments FOLDER NAME=N_KILLS …

A kill comes at a moment drawn evenly from the time that a whole run takes, and counts where the run
was still at work; each fifth run has two workers, which outlive their driver for a moment. Prints a
JSON object for each name: how many kills, how many met two workers, after how many something was
there and unfinished, and what was wrong after the next run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trilens
from checkpoint_cases import saved
from corpus_cases import contents, id_documents, tiny_checkpoint
from hostile.processes import RIGHT, child, wait
from trilens.checkpoint.format.plan import TernaryPlan

__all__ = ["COMMANDS", "kill_at_moments"]

FIFTH = 4
"""Of each five runs, the number of that with two workers."""

Command = Callable[[Path, Path, int], object]
"""From a checkpoint, a place and a number of workers to an output."""


def _ternarize(source: Path, out: Path, workers: int) -> None:
    plan = TernaryPlan("exact", group_size=16, rotate=True)
    trilens.ternarize(source, out, plan=plan, workers=workers)


def _capture(source: Path, out: Path, workers: int) -> None:
    options = trilens.StoreOptions(
        context=16, shard_tokens=64, layers=(0, 1), reduce=("covariance", "gating")
    )
    trilens.capture_corpus(str(source), id_documents(40), out, options=options, workers=workers)


COMMANDS: dict[str, tuple[Callable[[Path], object], Command]] = {
    "ternarize": (lambda folder: saved("llama", folder, shard_size="40KB"), _ternarize),
    "capture": (tiny_checkpoint, _capture),
}


def kill_at_moments(root: Path, name: str, n_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill a run n times, and look at what the next one gives."""
    make, run = COMMANDS[name]
    root.mkdir(parents=True)
    source, drawn = root / "source", random.Random(seed)
    make(source)
    run(source, root / "warm", 1)  # here: what is imported by now is not timed
    lasts: dict[int, float] = {}
    wanted: dict[str, bytes] = {}
    for workers in (1, 2) if n_kills > FIFTH else (1,):
        out = root / f"whole {workers}"
        began = time.monotonic()
        assert wait(child(lambda out=out, workers=workers: run(source, out, workers))) == RIGHT
        lasts[workers] = time.monotonic() - began
        wanted = wanted or contents(out)
        assert contents(out) == wanted
    kills = {1: 0, 2: 0}
    unfinished, wrong = 0, []
    for number in range(20 * n_kills):  # a run may end before it is killed
        if sum(kills.values()) == n_kills:
            break
        workers, out = 2 if 2 in lasts and number % 5 == FIFTH else 1, root / str(number)
        after = drawn.uniform(0, lasts[workers])
        driver = child(lambda out=out, workers=workers: run(source, out, workers))
        time.sleep(after)
        os.kill(driver, signal.SIGKILL)
        killed = wait(driver) == -signal.SIGKILL
        kills[workers] += killed
        moment = f"kill {number}: after {after:.3f} of {lasts[workers]:.3f} s, {workers} workers"
        unfinished += killed and out.exists() and contents(out) != wanted
        if wait(child(lambda out=out: run(source, out, 1))) != RIGHT:
            wrong.append(f"{moment}: the next run fails")
        elif contents(out) != wanted:
            wrong.append(f"{moment}: the next run gives something else")
        shutil.rmtree(out, ignore_errors=True)
    found = {"kills": sum(kills.values()), "of_two_workers": kills[2]}
    return {**found, "unfinished": unfinished, "wrong": wrong}


if __name__ == "__main__":
    for each, count in (argument.split("=") for argument in sys.argv[2:]):
        done = kill_at_moments(Path(sys.argv[1]) / each, each, int(count))
        sys.stdout.write(json.dumps({"name": each, **done}) + "\n")
