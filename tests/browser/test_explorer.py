"""The explorer in a real browser: a head clicked and knocked out, a URL reopened, other sites."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from urllib.parse import urlencode

import pytest

import trilens
from trilens.edits import parse_edit

PROMPT = "def area(r):\n    return r"
NEW = 6


@pytest.fixture(scope="module")
def server():
    """`trilens serve` on a free port of this machine; its address."""
    command = [sys.executable, "-m", "trilens", "serve", str(trilens.demo_path("transformer"))]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(240, process.kill)
    timer.start()
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://\S+/", line):
            break
    else:
        raise AssertionError(lines)
    timer.cancel()
    yield found[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130
    assert process.stderr.read() == ""
    process.stderr.close()


def ready(page) -> None:
    page.wait_for_selector("html[data-ready='true']")


def has_run(page) -> None:
    page.wait_for_selector("#written")
    ready(page)


def press(page, name: str) -> None:
    """Press what runs, and wait for the page of the result."""
    with page.expect_navigation():
        page.get_by_role("button", name=name, exact=True).click()
    has_run(page)


def texts(page) -> list[str]:
    return [each.text_content() for each in page.locator("#written pre").all()]


def chosen(page) -> str:
    return page.locator("#chosen-words").inner_text()


def test_a_head_is_knocked_out_and_the_text_changes(online, server: str) -> None:
    found = online(server)
    page = found.page
    ready(page)
    page.fill("#prompt", PROMPT)
    page.fill("#new", str(NEW))
    press(page, "Run")
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    plain = lens.generate(PROMPT, max_new_tokens=NEW).text
    assert texts(page) == [PROMPT + plain]

    # A head that the text hangs on, by its tile in the mosaic: layer 2, head 5.
    layer, head = 2, 5
    plot = page.locator(".mosaic").first
    plot.scroll_into_view_if_needed()
    box = plot.locator(".bk-CartesianFrame").first.bounding_box()
    page.mouse.click(
        box["x"] + (head + 0.5) / 8 * box["width"], box["y"] + (layer + 0.5) / 4 * box["height"]
    )
    page.wait_for_function(
        "document.querySelector('#chosen-words').textContent.includes('layer 2')"
    )
    page.locator("#chip-3").click()
    assert chosen(page).startswith("layer 2, head 5; token 3 ")
    assert "layer=2" in page.url and "head=5" in page.url and "token=3" in page.url

    press(page, "Knock out this head")
    edited = lens.generate(PROMPT, max_new_tokens=NEW, edits=[parse_edit("ablate:attn.z@2#5")])
    assert texts(page) == [PROMPT + plain, PROMPT + edited.text]
    assert page.locator("#edits li code").all_inner_texts() == ["ablate:attn.z@2#5"]
    found.quiet(server)

    # The URL alone gives the same state, whoever opens it.
    again = online(page.url)
    ready(again.page)
    has_run(again.page)
    assert texts(again.page) == texts(page)
    assert chosen(again.page) == chosen(page)
    assert again.page.locator(".heads").first.get_attribute("data-layer") == "2"
    assert again.page.locator(".heads").first.get_attribute("data-head") == "5"
    again.quiet(server)


def test_a_run_is_watched_and_cancelled_and_an_error_is_read(online, server: str) -> None:
    found = online(f"{server}?prompt=x+%3D&new=200")
    page = found.page
    page.get_by_role("button", name="Cancel").click()
    problem = page.locator("#problem")
    problem.wait_for()
    assert problem.inner_text() == "RunCancelledError: the run was cancelled"
    assert page.get_by_role("button", name="Run").is_enabled()
    page.fill("#edit", "ablate:attn.z@99")
    page.keyboard.press("Enter")
    page.fill("#new", "1")
    page.get_by_role("button", name="Run").click()
    page.locator("#problem", has_text="layer 99").wait_for()
    assert "EditRangeError" in problem.inner_text()
    page.get_by_role("button", name="Remove edit ablate:attn.z@99").click()
    press(page, "Run")
    assert len(texts(page)) == 1
    found.quiet(server)


def test_a_second_page_waits_and_goes_on_when_the_first_is_closed(online, server: str) -> None:
    second = online(server)
    page = second.page
    ready(page)
    page.fill("#prompt", "y =")
    page.fill("#new", "1")
    first = online(f"{server}?prompt=x+%3D&new=200")
    first.page.locator("#writing pre").wait_for()
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator("#step", has_text="waiting: 1 before this one").wait_for()
    with page.expect_navigation():
        first.page.close()
    has_run(page)
    assert texts(page)[0].startswith("y =")
    second.quiet(server)


PAGES = {
    "empty": "",
    "run": f"?{urlencode({'prompt': PROMPT, 'new': NEW})}",
    "edited": f"?{urlencode({'prompt': PROMPT, 'edit': 'ablate:attn.z@2#5', 'new': NEW})}",
    "wrong": "?layer=x",
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_serious(online, server: str, screenshot, serious, name: str) -> None:
    """By the rules of axe-core, in both colour schemes; a picture of each page is kept."""
    found = online(server + PAGES[name], color_scheme="light")
    page = found.page
    ready(page)
    if "prompt" in PAGES[name]:
        has_run(page)
    for scheme, rules in (("light", ()), ("dark", ("color-contrast",))):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        assert not serious(page, *rules), scheme
        screenshot(page, f"explorer-{name}-{scheme}")
    found.quiet(server) if name != "wrong" else None


def test_nothing_serious_while_it_runs(online, server: str, screenshot, serious) -> None:
    page = online(f"{server}?prompt=x+%3D&new=200", color_scheme="dark").page
    # However fast it runs, the page stays what it is: what it would go to is no page.
    page.route(re.compile("new=200"), lambda route: route.fulfill(status=204))
    page.locator("#writing pre").wait_for()
    assert not serious(page)
    assert page.locator("#progress progress").is_visible()
    screenshot(page, "explorer-running-dark")
    page.get_by_role("button", name="Cancel").click()  # there, also when it is done


def tab_to(page, selector: str, *, most: int = 30) -> None:
    """Press Tab until what is selected has the focus."""
    for _ in range(most):
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))


def test_by_keyboard_alone(online, server: str) -> None:
    """A prompt is typed and run, a token and a head are chosen, the head is knocked out."""
    found = online(server)
    page = found.page
    ready(page)
    tab_to(page, "#prompt")
    page.keyboard.type("a = b")
    tab_to(page, "#new")
    page.keyboard.press("Control+A")
    page.keyboard.type("3")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    has_run(page)
    (text,) = texts(page)
    # The text itself can be scrolled by keyboard, and so is a stop.
    tab_to(page, "#written pre")
    tab_to(page, ".chip[aria-selected=true]")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    tab_to(page, "select.layer")
    page.keyboard.type("1")
    tab_to(page, "select.head")
    page.keyboard.type("3")
    assert chosen(page).startswith("layer 1, head 3; token 1 ")
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Knock out this head":
            break
    with page.expect_navigation():
        page.keyboard.press("Enter")
    has_run(page)
    before, _ = texts(page)
    assert before == text
    assert page.locator("#edits li code").all_inner_texts() == ["ablate:attn.z@1#3"]
    tab_to(page, "#edits button")
    page.keyboard.press("Enter")
    assert page.locator("#edits li").count() == 0
    # Where the button was, the focus goes on from the box for edits.
    assert page.evaluate("document.activeElement.id") == "edit"
    found.quiet(server)


def test_another_site_can_neither_read_nor_run(online, server: str) -> None:
    """A page of another origin, the host by another name, asks as a browser lets it."""
    found = online(server.replace("127.0.0.1", "localhost"))
    ready(found.page)
    answers = found.page.evaluate(
        """async (home) => {
          const said = [];
          for (const [how, type] of [["cors", "application/json"], ["no-cors", "text/plain"]]) {
            try {
              const answer = await fetch(home + "run", {method: "POST", mode: how, body: "{}",
                headers: {"content-type": type}});
              said.push(answer.type);
            } catch (error) { said.push(error.name); }
          }
          return said;
        }""",
        server,
    )
    assert answers == ["TypeError", "TypeError"]
