"""The lower bounds of dependencies are versions that are really run: those of constraints.txt."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trilens

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
EXTRAS = PROJECT["optional-dependencies"]
# The peers of the benchmarks are not installed by any test.
RUN = [
    *PROJECT["dependencies"],
    *(line for name in EXTRAS if name != "bench" for line in EXTRAS[name]),
]


@pytest.mark.parametrize("line", RUN)
def test_lower_bounds_are_the_tested_versions(line: str) -> None:
    needed = Requirement(line)
    assert [str(each) for each in needed.specifier] == [f">={TESTED[needed.name]}"]


def test_the_version_is_said_once() -> None:
    assert PROJECT["version"] == trilens.__version__
