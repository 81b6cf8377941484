"""Two writers with one output, started together: each is refused by name or right.

    python -m hostile.races FOLDER OUTPUT=N_ROUNDS …

prints a JSON object for each: how many rounds, how the pairs ended, and what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from hostile.outputs import OUTPUTS, both_versions, check, clear, content, prepare
from hostile.processes import REFUSED, RIGHT, child, wait

__all__ = ["race"]


def race(root: Path, name: str, n_rounds: int) -> dict[str, Any]:
    """Run two writers of this output at once, many times."""
    output = OUTPUTS[name]
    root.mkdir(exist_ok=True)
    output.ready()
    sources, place = root / "sources", root / "work" / output.name
    assert wait(child(lambda: prepare(sources, {name}))) == RIGHT
    wanted = both_versions(output, sources, place)
    ends: Counter[str] = Counter()
    wrong = []
    for turn in range(n_rounds):
        clear(place.parent)
        # Even rounds ask for the same twice, odd ones for two things.
        asked = (0, turn % 2)
        reader, writer = os.pipe()
        start = partial(_start, reader, writer)
        runs = [
            child(lambda which=which: output.write(sources, which, place), before=start)
            for which in asked
        ]
        os.close(reader)
        os.close(writer)
        codes = [wait(run) for run in runs]
        ends[" ".join(map(str, sorted(codes)))] += 1
        right = [which for which, code in zip(asked, codes, strict=True) if code == RIGHT]
        names = {path.name for path in place.parent.iterdir()}
        if set(codes) - {RIGHT, REFUSED}:
            wrong.append(f"round {turn}: exit codes {codes}")
        elif right and wait(child(lambda: check(place))) != RIGHT:
            wrong.append(f"round {turn}: {codes}, and the output is damaged")
        elif right and content(place) not in [wanted[which] for which in right]:
            wrong.append(f"round {turn}: {codes}, and the output is none of those asked for")
        elif names - {output.name} or not right:
            wrong.append(f"round {turn}: {codes}, left {sorted(names)}")
    shutil.rmtree(place.parent)
    return {"rounds": n_rounds, "ends": dict(ends), "wrong": wrong}


def _start(reader: int, writer: int) -> None:
    """Both go on when the parent closes its end."""
    os.close(writer)
    os.read(reader, 1)


if __name__ == "__main__":
    for each, count in (argument.split("=") for argument in sys.argv[2:]):
        done = race(Path(sys.argv[1]) / each, each, int(count))
        sys.stdout.write(json.dumps({"name": each, **done}) + "\n")
