"""What trilens writes under attack: kills, races, wrong bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hostile.flips import unnoticed_flips
from hostile.outputs import OUTPUTS, prepare
from hostile.scale import FULL, scaled

TESTS = Path(__file__).resolve().parent.parent
KILLS = {
    "capture": (4, 20),
    "comparison": (4, 15),
    "ternary": (4, 15),
    "gguf": (2, 15),
    "conversion": (4, 15),
    "store": (4, 20),
}
"""Of each output, in a normal and in a hostile run."""


# A process of its own takes seconds to start: one for all where little is done in it.
GROUPS = [(name,) for name in OUTPUTS] if FULL else [tuple(OUTPUTS)]


def driven(module: str, folder: Path, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Run a driver in a process of its own, which has one thread and may fork."""
    paths = [str(TESTS), str(TESTS.parent), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, folder, *(f"{name}={n}" for name, n in counts.items())],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in found] == list(counts)
    return found


@pytest.mark.parametrize("names", GROUPS)
def test_killed_writers_lose_nothing(names: tuple[str, ...], tmp_path: Path) -> None:
    counts = {name: scaled(subset=KILLS[name][0], full=KILLS[name][1]) for name in names}
    for found in driven("hostile.kills", tmp_path, counts):
        assert found["kills"] > 0
        wrong = {key: found[key] for key in ("lost", "left", "broken") if found[key]}
        assert not wrong, found["name"]


@pytest.mark.parametrize("name", ["ternarize", "capture"])
def test_after_a_kill_at_any_moment_the_same_command_ends_as_if_none_had_been(
    name: str, tmp_path: Path
) -> None:
    kills = scaled(full=25, subset=3)
    (found,) = driven("hostile.moments", tmp_path, {name: kills})
    assert found["kills"] == kills
    assert not found["wrong"]


@pytest.mark.parametrize("names", GROUPS)
def test_of_two_writers_each_is_refused_or_right(names: tuple[str, ...], tmp_path: Path) -> None:
    for found in driven("hostile.races", tmp_path, dict.fromkeys(names, scaled(full=4, subset=2))):
        assert not found["wrong"], found["name"]
        assert sum(found["ends"].values()) == found["rounds"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_wrong_bit_is_noticed(name: str, tmp_path: Path) -> None:
    output = OUTPUTS[name]
    prepare(tmp_path / "sources", {name})
    output.write(tmp_path / "sources", 0, tmp_path / output.name)
    assert not unnoticed_flips(tmp_path / output.name, scaled(full=1000, subset=20))
