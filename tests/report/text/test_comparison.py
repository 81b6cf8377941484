"""The text of a comparison: words of the field, every digit at any width."""

from __future__ import annotations

import re

import pytest

from trilens.analysis.comparison.run import compare
from trilens.demo import demo_path
from trilens.report.text.comparison import render_comparison


@pytest.fixture(scope="module")
def comparison():
    return compare(demo_path(), demo_path(), ["import os", "def f(n):\n    return n"])


def test_no_digit_is_lost_on_a_narrow_terminal(comparison) -> None:
    wide, narrow = (render_comparison(comparison, width) for width in (200, 60))
    assert max(map(len, narrow.splitlines())) <= 60
    numbers = re.compile(r"\d[\d.e-]*%?")
    gone = set(numbers.findall(wide)) ^ set(numbers.findall(narrow))
    assert not gone
    assert "…" not in narrow


def test_a_long_memory_is_not_called_damage() -> None:
    mamba = demo_path("mamba")
    text = render_comparison(compare(mamba, mamba, ["import os"]), 200)
    assert "newly saturated (>0.9)" in text
    assert "note: of a decay" in text


def test_words(comparison) -> None:
    text = render_comparison(comparison, 200)
    for word in ("converged", "newly saturated", "target token", "convergence layer"):
        assert word in text
    for word in ("settled", "sat.", "right token"):
        assert word not in text
    assert not [line for line in text.splitlines() if line.startswith("layer") and "→" in line]
    (converged,) = comparison.select("settled", layer=0)
    assert f"{converged.after:.1%}" in text
