"""Every input format, damaged from seeds; `TRILENS_HOSTILE=1` reads a hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostile.fuzz import run_inputs
from hostile.scale import scaled
from hostile.targets import TARGETS

_PARTS = 2
"""So that two processes share what takes longest."""


@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs(name: str, part: int, tmp_path: Path) -> None:
    target = TARGETS[name]
    n = scaled(subset=target.few, full=target.many)
    findings, refused = run_inputs(target, range(part, n, _PARTS), tmp_path)
    assert not findings, "\n\n".join(map(str, findings[:5]))
    assert refused > 0
