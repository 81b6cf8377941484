"""The docs on disk, in a real browser without a network: what is searched for is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "build" / "site"


@pytest.fixture
def docs(tabs):
    """Opens a page of the site that `make docs` built, offline."""
    assert SITE.joinpath("index.html").is_file(), "no site in build/site: `make docs` builds it"

    def open_page(name: str, **options):
        found = tabs(offline=True, **options)
        found.page.goto((SITE / name).as_uri())
        return found

    return open_page


def results(page, words: str) -> list[str]:
    """What the search lists for words that are typed."""
    page.get_by_role("textbox", name="Search").click()
    page.keyboard.type(words)
    counted = page.locator(".md-search-result__meta", has_text=" matching document")
    counted.wait_for()
    return page.locator(".md-search-result__item").all_inner_texts()


@pytest.mark.parametrize(
    ("start", "words", "target"),
    [
        ("index.html", "absmean_refit", "ternary.html"),
        ("reference/lens.html", "capture_many", "stacks.html"),  # from a folder below
    ],
)
def test_a_word_is_found(docs, screenshot, start: str, words: str, target: str) -> None:
    found = docs(start)
    page = found.page
    listed = results(page, words)
    assert listed and words in " ".join(listed)
    screenshot(page, f"site-search-{words}")
    link = page.locator(f".md-search-result__link[href*='{target}']").first
    link.click()
    page.wait_for_url(re.compile(re.escape(target)))
    assert words in page.locator("article").inner_text()
    found.quiet()


def test_what_is_nowhere_is_not_found(docs) -> None:
    found = docs("index.html")
    assert results(found.page, "qzxjkv") == []
    assert "No matching documents" in found.page.locator(".md-search-result__meta").inner_text()
    found.quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious(docs, serious, screenshot, scheme: str) -> None:
    for name in ("index", "reference/lens"):
        page = docs(f"{name}.html", color_scheme=scheme).page
        assert not serious(page), name
        screenshot(page, f"site-{name.replace('/', '-')}-{scheme}")
