"""A Chromium of the system, without a network: pages are opened from disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PACKAGES = ("playwright", "axe_playwright_python", "nbconvert")
PATIENCE = 240  # seconds: a busy machine is slow, not wrong
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def absent() -> str:
    """Why there is no browser; "" where there is one."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: `make test-browser` installs it"
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium on this machine: apt-get install chromium"
    return ""


def pytest_collection_modifyitems(items) -> None:
    if os.environ.get("TRILENS_BROWSER"):
        return
    why, here = absent(), Path(__file__).parent
    no_site = "" if SITE.is_dir() else "no site in build/site: `make docs` builds it"
    for item in items:
        file = Path(item.fspath)
        if here in file.parents and (reason := why or no_site * (file.name == "test_site.py")):
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Opened:
    """A page, and all that it asked for or complained of."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def quiet(self, server: str = "file:") -> None:
        """Nothing but the file, or its server, was asked for, nothing was complained of."""
        asked = [each for each in self.requests if not each.startswith((server, "blob:", "data:"))]
        assert not asked and not self.complaints, (asked, self.complaints)


@pytest.fixture(scope="module")
def chromium():
    """A browser, closed after each module: Playwright's event loop runs until then, and in the same
    process no test could run one of its own."""
    assert not absent(), absent()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        path = next(filter(None, map(shutil.which, BROWSERS)))
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def screenshot():
    """Keeps a picture of a page: in build/screenshots, or where `TRILENS_SCREENSHOTS` says."""
    folder = Path(os.environ.get("TRILENS_SCREENSHOTS", ROOT / "build" / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def keep(page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return keep


SERIOUS = {"serious", "critical"}


@pytest.fixture
def serious():
    """What axe-core finds, of all its rules or some: rule, impact, what to do, first elements."""
    from axe_playwright_python.sync_playwright import Axe

    def find(page, *rules: str) -> list[str]:
        options: dict[str, object] = {"resultTypes": ["violations"]}
        if rules:
            options["runOnly"] = list(rules)
        found = Axe().run(page, options=options).response["violations"]
        return [
            f"{each['id']} ({each['impact']}): {each['help']}: "
            + "; ".join(f"{node['target']} {node['html'][:160]}" for node in each["nodes"][:3])
            for each in found
            if each["impact"] in SERIOUS
        ]

    return find


@pytest.fixture
def tabs(chromium):
    """Opens tabs, each with a context of its own, that note what they ask for and complain of."""
    contexts = []

    def open_tab(**options) -> Opened:
        options.setdefault("viewport", {"width": 1280, "height": 900})
        context = chromium.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        found = Opened(context.new_page())
        found.page.on("request", lambda each: found.requests.append(each.url))
        found.page.on(
            "console",
            lambda each: found.complaints.append(each.text) if each.type != "log" else None,
        )
        found.page.on("pageerror", lambda each: found.complaints.append(str(each)))
        return found

    yield open_tab
    for context in contexts:
        context.close()


@pytest.fixture
def opened(tabs):
    """Opens a file, offline, and waits until the page says that it is whole."""

    def open_file(file: Path, **options) -> Opened:
        found = tabs(offline=True, **options)
        found.page.goto(file.as_uri())
        found.page.wait_for_selector("html[data-ready]")
        assert found.page.evaluate("document.documentElement.dataset.ready") == "true"
        return found

    return open_file


@pytest.fixture
def online(tabs):
    """Opens the address of a server of this machine."""

    def open_address(address: str, **options) -> Opened:
        found = tabs(**options)
        found.page.goto(address)
        return found

    return open_address
