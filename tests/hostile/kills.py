"""Kill a writer before and after each of its file calls: the old result or the new one is there,
and the next run ends as if nothing had been. A disk without room is refused by name.

    python -m hostile.kills FOLDER OUTPUT=N_KILLS …

prints a JSON object for each: how many kills, and what was lost or left behind.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hostile.outputs import OUTPUTS, both_versions, check, clear, content, prepare
from hostile.processes import REFUSED, RIGHT, child, counted, wait
from trilens.errors import TrilensError
from trilens.io.temporary import is_leftover

__all__ = ["kill_everywhere"]


def kill_everywhere(root: Path, name: str, n_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill a writer of this output at n places, spread over its calls; look, and run again."""
    output = OUTPUTS[name]
    root.mkdir(exist_ok=True)
    output.ready()
    sources, place, counts = root / "sources", root / "work" / output.name, root / "count"
    assert wait(child(lambda: prepare(sources, {name}))) == RIGHT
    wanted = both_versions(output, sources, place)
    assert wanted[0] != wanted[1]
    old = wanted[0] if output.replaces else {}
    kept = root / "old"
    clear(kept)
    if output.replaces:
        clear(place.parent)
        assert wait(child(lambda: output.write(sources, 0, place))) == RIGHT
        shutil.copytree(place.parent, kept, dirs_exist_ok=True)

    def fresh() -> None:
        shutil.rmtree(place.parent)
        shutil.copytree(kept, place.parent)

    def write() -> None:
        output.write(sources, 1, place)

    fresh()
    with counts.open("w") as file:
        note = partial(os.pwrite, file.fileno())

        def count() -> None:
            counted(0, after=False, report=lambda n: note(b"%9d" % n, 0))

        assert wait(child(write, before=count)) == RIGHT
    n_calls = int(counts.read_text() or "0")
    moments = [(at, after) for at in range(1, n_calls + 1) for after in (False, True)]
    chosen = random.Random(seed).sample(moments, min(n_kills, len(moments)))
    lost, left, broken = [], [], []
    for at, after in sorted(chosen):
        fresh()
        code = wait(child(write, before=lambda at=at, after=after: counted(at, after=after)))
        moment = f"{'after' if after else 'before'} call {at} of {n_calls}"
        found = content(place) if place.exists() else {}
        whole = wait(child(lambda: check(place))) == RIGHT
        if output.replaces and not whole:
            lost.append(moment)
        if whole and not (_holds(found, old) or _holds(found, wanted[1])):
            broken.append(f"{moment}: something else passes")
        if code not in {-9, RIGHT}:
            broken.append(f"{moment}: exit {code}")
        if wait(child(lambda: _again(output, sources, place))) != RIGHT:
            broken.append(f"{moment}: the next run fails")
        elif content(place) != wanted[1]:
            broken.append(f"{moment}: the next run gives something else")
        names = {str(path.relative_to(place.parent)) for path in place.parent.rglob("*")}
        extra = names - set(wanted[1]) - {output.name}
        if extra:
            left.append(f"{moment}: {sorted(extra)}")
    for limit in (0, 200, 3000):  # bytes that a file may have: as on a full disk
        fresh()
        moment = f"files of at most {limit} bytes"
        if wait(child(write, before=lambda limit=limit: _limit(limit))) != REFUSED:
            broken.append(f"{moment}: not refused by name")
        if output.replaces and content(place) != old:
            lost.append(moment)
        if any(is_leftover(path.name) for path in place.parent.rglob("*")):
            left.append(moment)
        if wait(child(write)) != RIGHT or content(place) != wanted[1]:
            broken.append(f"{moment}: the next run gives something else")
    return {"calls": n_calls, "kills": len(chosen), "lost": lost, "left": left, "broken": broken}


def _limit(n_bytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, most))


def _holds(found: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    """Whether an output is this one; parts of a comparison may have other names for a while."""
    parts = {data for name, data in wanted.items() if not name.endswith("comparison.json")}
    return bool(parts) and parts <= set(found.values())


def _again(output: Any, sources: Path, place: Path) -> None:
    """The same command; where it had ended before it was killed, its output is there."""
    if output.replaces or not place.exists() or not _is_whole(place):
        output.write(sources, 1, place)


def _is_whole(place: Path) -> bool:
    try:
        check(place)
    except TrilensError:
        return False
    return not (place / "trilens-unfinished.json").exists()


if __name__ == "__main__":
    for each, count in (argument.split("=") for argument in sys.argv[2:]):
        done = kill_everywhere(Path(sys.argv[1]) / each, each, int(count))
        sys.stdout.write(json.dumps({"name": each, **done}) + "\n")
