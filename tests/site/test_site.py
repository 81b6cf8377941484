"""The site that `make docs` built: whole, and sufficient to itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from api_page import PACKAGES, names

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
# Attributes that a browser follows by itself, as it does not a link's.
_FETCHED = {"src", "srcset", "data", "poster", "action"}


class Tags(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    @property
    def fetched(self) -> list[str]:
        return [
            value
            for tag, attributes in self.tags
            for name, value in attributes.items()
            if name in _FETCHED or (name == "href" and tag in {"link", "use", "image"})
        ]


PAGES = {
    page.relative_to(SITE).as_posix(): Tags(page) for page in sorted(SITE.rglob("*.html"))
}  # fmt: skip
assert PAGES, "no site in build/site: make docs"
TARGETS = {
    f"{name}#{attributes['id']}"
    for name, page in PAGES.items()
    for _, attributes in page.tags
    if "id" in attributes
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_from_elsewhere(name: str) -> None:
    found = PAGES[name].fetched
    assert found  # style sheets and scripts at least
    for target in found:
        assert not re.match(r"[a-z]+:|//", target) or target.startswith("data:"), target
        if name != "404.html" and not target.startswith(("data:", "#")):
            assert (SITE / name).parent.joinpath(target.partition("#")[0]).exists(), target


def test_style_sheets_fetch_nothing_from_elsewhere() -> None:
    sheets = list(SITE.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        found = re.findall(r"url\(\s*[\"']?([^)\"']+)|@import\s+([^;]+)", sheet.read_text())
        for target in ("".join(each) for each in found):
            assert target.startswith(("data:", "#")) or (sheet.parent / target).exists(), target


def links_of(name: str) -> set[str]:
    """Where the links of a page lead, as TARGETS has it."""
    folder = (SITE / name).parent
    found = set()
    for tag, attributes in PAGES[name].tags:
        target, _, part = attributes.get("href", "").partition("#")
        if tag == "a" and target and not re.match(r"[a-z]+:", target):
            path = folder.joinpath(target).resolve().relative_to(SITE.resolve())
            found.add(f"{path.as_posix()}#{part}")
    return found


def test_every_public_name_has_its_place_and_is_led_to() -> None:
    first: dict[int, str] = {}
    links = links_of("api.html")
    by_name = {target.partition("#")[2]: target for target in TARGETS if "reference/" in target}
    for package in PACKAGES:
        for name, value in names(package).items():
            shown = first.setdefault(id(value), f"{package}.{name}")
            assert shown in by_name, shown
            assert by_name[shown] in links, f"docs/api.md does not lead to {shown}"


def test_methods_are_there_inherited_ones_too() -> None:
    assert "reference/lens.html#trilens.Lens.capture" in TARGETS
    assert "reference/lens.html#trilens.Lens.from_pretrained" in TARGETS
    assert not [each for each in TARGETS if re.search(r"#trilens\..*\._[a-z]", each)]


def test_every_page_and_script_is_there() -> None:
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    missing = {page.with_suffix(".html").as_posix() for page in pages} - set(PAGES)
    assert not missing
    scripts = {f"tutorials/{path.stem}.html" for path in (ROOT / "examples").glob("*.py")}
    assert scripts <= set(PAGES) and len(scripts) > 5
    assert {"index.html", "changelog.html", "contributing.html", "security.html"} <= set(PAGES)


def test_the_search_knows_the_docs() -> None:
    index = (SITE / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = ")
    assert "absmean_refit" in index and "trilens.Lens.capture" in index
