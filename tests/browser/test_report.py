"""Reports in a real browser: offline, quiet, by pointer and by keyboard, in both colour schemes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import trilens
from page_cases import HOSTILE, attention, heads_page, rendered
from trilens.report.html.report import make_report
from trilens.report.notebook.views import framed
from trilens.report.words import token_text

PROMPT = "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial("


@pytest.fixture(scope="module")
def lens():
    return trilens.Lens.from_pretrained(trilens.demo_path("transformer"))


@pytest.fixture(scope="module")
def cap(lens):
    return lens.capture(PROMPT, residual="all", attention=True, gates=True)


@pytest.fixture(scope="module")
def report(cap, lens, tmp_path_factory) -> Path:
    return make_report(cap, lens=lens).save(tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_quiet_and_has_both_colour_schemes(opened, report, screenshot, scheme: str) -> None:
    found = opened(report, color_scheme=scheme)
    page = found.page
    found.quiet()
    screenshot(page, f"report-{scheme}")
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, body[4:-1].split(", "))) > 600
    assert light == (scheme == "light")
    # The canvases follow: each chart has one, and a click on the other scheme draws them anew.
    assert page.locator(".plot canvas").count() >= page.locator("[data-block] .plot").count()
    page.get_by_role("button", name="Dark" if scheme == "light" else "Light").click()
    page.wait_for_timeout(300)
    other = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert other != body
    found.quiet()


def spot(page, selector: str, x: float, y: float) -> None:
    """Scroll a chart into view and move to a place in it, as shares of its frame."""
    plot = page.locator(selector).first
    plot.scroll_into_view_if_needed()
    frame = plot.locator(".bk-CartesianFrame").first
    box = frame.bounding_box()
    page.mouse.move(box["x"] + x * box["width"] - 3, box["y"] + y * box["height"])
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)


def test_a_head_is_clicked_and_its_weight_read(opened, report, cap) -> None:
    found = opened(report)
    page = found.page
    # Layer 2 of 4, head 5 of 8: the middle of its tile.
    spot(page, ".mosaic", 5.5 / 8, 2.5 / 4)
    page.wait_for_selector("#tip:not([hidden])")
    tip = page.locator("#tip").inner_text()
    assert "layer 2, head 5" in tip and "query" in tip and "weight" in tip
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector(".heads[data-layer='2'][data-head='5']")
    assert page.locator(".pattern-title").inner_text() == "Pattern of layer 2, head 5"
    # The last query's row of the pattern, its heaviest key.
    weights = cap.attention.attention_from_position(2, -1, head=5)
    key = int(weights.argmax())
    n = len(weights)
    spot(page, ".pattern", (key + 0.5) / n, (n - 0.5) / n)
    page.wait_for_function(f"document.getElementById('tip').innerText.includes('key {key} ')")
    tip = page.locator("#tip").inner_text()
    assert float(tip.split("weight ")[1]) == pytest.approx(float(weights[key]), abs=0.01)
    found.quiet()


def test_by_keyboard_alone(opened, report) -> None:
    found = opened(report)
    page = found.page
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
    last = int(page.evaluate("document.activeElement.dataset.i"))
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.i") == str(last - 1)
    assert page.locator(".chip[aria-selected=true]").count() == 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.i") == "1"
    assert "token 1 of" in page.locator("#strip-words").inner_text()
    # One tab stop for all chips, then the head's lists.
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "layer":
            break
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".heads[data-layer='1']")
    found.quiet()


def test_the_table_behind_a_picture_is_downloaded(opened, report, cap, tmp_path) -> None:
    page = opened(report).page
    page.locator(".heads .row details summary").click()
    # A fold's toggle, on which the table is filled, comes after the click.
    rows = page.locator(".row-table tbody tr")
    rows.last.wait_for()
    assert rows.count() == len(cap.tokens)
    with page.expect_download() as waited:
        page.locator(".pattern-csv").click()
    waited.value.save_as(tmp_path / "pattern.csv")
    found = list(csv.DictReader((tmp_path / "pattern.csv").read_text().splitlines()))
    n = len(cap.tokens)
    assert len(found) == n * (n + 1) // 2
    heads = page.locator(".heads").first
    layer, head = (int(heads.get_attribute(f"data-{name}")) for name in ("layer", "head"))
    true = cap.attention.get_layer(layer)[0, head]
    for row in found[-n:]:
        weight = float(true[int(row["query"]), int(row["key"])])
        assert float(row["weight"]) == pytest.approx(weight, abs=0.01)


def test_a_token_is_text_whatever_it_says(opened, tmp_path) -> None:
    page = heads_page(attention(len(HOSTILE), layers=2, heads=2, signed=True), HOSTILE, "effective")
    file = tmp_path / "hostile.html"
    file.write_text(rendered(page))
    found = opened(file)
    found.quiet()
    chips = found.page.locator(".chip")
    shown = [chips.nth(i).inner_text() for i in range(len(HOSTILE))]
    assert shown == [token_text(token) or "∅" for token in HOSTILE]
    assert not found.page.evaluate("document.querySelectorAll('main img').length")


def test_ten_thousand_tokens(opened, tmp_path) -> None:
    page = heads_page(attention(512, layers=1, heads=2), [f"t{i}" for i in range(10_000)])
    file = tmp_path / "long.html"
    file.write_text(rendered(page))
    found = opened(file)
    assert found.page.locator(".chip").count() == 10_000
    found.page.locator("#chip-9999").press("ArrowLeft")
    assert "token 9998 of 10000" in found.page.locator("#strip-words").inner_text()
    found.quiet()


def test_a_phone_and_paper(opened, report, screenshot, tmp_path) -> None:
    found = opened(report, viewport={"width": 390, "height": 800})
    page = found.page
    screenshot(page, "report-phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.pdf(path=tmp_path / "report.pdf")
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_timeout(1000)
    screenshot(page, "report-print")
    ink = "getComputedStyle(document.body).color"
    assert page.evaluate(ink) == "rgb(28, 33, 40)"  # dark on white, whatever the screen's scheme
    found.quiet()


def test_in_the_frame_of_a_notebook(opened, cap, lens, tmp_path) -> None:
    file = tmp_path / "notebook.html"
    framed_page = framed(make_report(cap, lens=lens).html)
    file.write_text(f"<!doctype html><html data-ready='true'><body>{framed_page}")
    found = opened(file)
    frame = found.page.frame_locator("iframe")
    frame.locator("html[data-ready='true']").wait_for()
    assert frame.locator(".mosaic canvas").count() >= 1
    found.quiet()
