"""What the site is made of, without the generator: names of the reference, cells of the scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from api_page import PACKAGES, PAGE, names
from website.reference import NAMES, linked, pages
from website.tutorials import EXAMPLES, read_script, shown_of, tutorial

ROOT = Path(__file__).parents[1]


def test_the_reference_has_what_the_packages_have() -> None:
    assert set(NAMES) == {f"{package}.{name}" for package in PACKAGES for name in names(package)}


def test_each_name_stands_once() -> None:
    shown = [
        line[4:] for text in pages().values() for line in text.splitlines() if line[:3] == ":::"
    ]
    assert len(shown) == len(set(shown))
    assert {NAMES[name] for name in shown} == set(NAMES.values())
    assert "trilens.Lens" in shown and "trilens.ternary.CODECS" in shown


def test_the_list_leads_to_the_reference() -> None:
    text = linked(PAGE.read_text(encoding="utf-8"))
    assert "- [`Lens`][trilens.Lens]: Opens" in text
    assert "- [`Comparison`][trilens.Comparison]: See" in text
    assert "- `" not in text


@pytest.mark.parametrize("name", [path.stem for path in sorted(EXAMPLES.glob("*.py"))])
def test_a_tutorial_is_the_whole_script(name: str) -> None:
    script = read_script(name)
    page = tutorial(script)
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# %%"))
    assert all(line in page for line in lines[first:] if not line.startswith("# %%"))
    assert [cell.line for cell in script.cells] == [
        i + 2 for i, line in enumerate(lines) if line.startswith("# %%")
    ]
    assert all(f"\n## {cell.title}\n" in page for cell in script.cells)
    assert any(shown_of(script))
