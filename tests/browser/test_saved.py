"""What is served without a model, in a real browser; a report under its sandbox."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import uvicorn

import trilens
from trilens.explorer.app import saved_app
from trilens.explorer.saved import open_saved
from trilens.explorer.serving import bind

PROMPT = "def area(r):\n    return r"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    cap = lens.capture(PROMPT, residual="all", attention=True, gates=True)
    trilens.capture_corpus(lens, [PROMPT, "x = 1"], folder / "store")
    return {
        "report": trilens.make_report(cap, lens=lens).save(folder / "report.html"),
        "capture": cap.save(folder / "capture.safetensors"),
        "comparison": trilens.compare(lens, lens, [PROMPT]).save(folder / "comparison"),
        "store": folder / "store",
    }


@pytest.fixture
def served(saved):
    """Serves one of them; its address."""
    running = []

    def serve(name: str) -> str:
        bound = bind(None, 0)
        app = saved_app(open_saved(saved[name]), bound.rules)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound.socket]})
        thread.start()
        running.append((server, thread, bound.socket))
        return bound.address

    yield serve
    for server, thread, socket in running:
        server.should_exit = True
        thread.join(30)
        socket.close()


@pytest.mark.parametrize("name", ["report", "capture", "comparison", "store"])
def test_it_is_shown_whole_and_nothing_else_is_asked_for(
    online, served, screenshot, serious, tmp_path, name: str
) -> None:
    address = served(name)
    found = online(address, color_scheme="light", accept_downloads=True)
    page = found.page
    page.wait_for_selector("html[data-ready='true']")
    for plot in page.locator("[data-block] .plot").all():
        assert plot.locator("canvas").count() >= 1
    assert not serious(page)
    screenshot(page, f"served-{name}")
    page.locator("details.twin summary").first.click()
    with page.expect_download() as waited:
        page.locator("button.csv").first.click()
    waited.value.save_as(tmp_path / "table.csv")
    assert len((tmp_path / "table.csv").read_text().splitlines()) > 1
    found.quiet(address)


def test_a_report_that_is_served_has_an_origin_of_its_own(online, served) -> None:
    page = online(served("report")).page
    page.wait_for_selector("html[data-ready='true']")
    assert page.evaluate("self.origin") == "null"
    asked = "fetch('/').then(() => 'read', (error) => error.name)"
    assert page.evaluate(asked) == "TypeError"
