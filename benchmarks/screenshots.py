"""The pictures of README and docs, from the demo models: `python -m benchmarks.screenshots`.

Needs a Chromium and Playwright: `make test-browser` installs the latter.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import trilens
from trilens.text.documents import read_documents
from trilens.text.token_blocks import token_blocks

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
MOST_BYTES = 200_000
EXPLORED = "def area(width, height):\n    return width *"
PROMPT = "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial("


def reports(folder: Path) -> dict[str, Path]:
    """The three reports that are photographed."""
    found = {}
    for name in ("transformer", "rwkv7"):
        lens = trilens.Lens.from_pretrained(trilens.demo_path(name))
        recurrent = bool(lens.effective_layers)
        cap = lens.capture(
            PROMPT, residual="all", attention=not recurrent, effective=recurrent, gates=True
        )
        found[name] = trilens.make_report(cap, lens=lens).save(folder / f"{name}.html")
    before = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    plan = trilens.TernaryPlan(rule="exact", group_size=128)
    trilens.ternarize(trilens.demo_path("transformer"), folder / "ternary", plan=plan)
    after = trilens.Lens.from_pretrained(folder / "ternary")
    text = read_documents(ROOT / "docs" / "data" / "sample.txt")
    blocks = token_blocks(before.tokenizer, text, length=256, limit_tokens=1024)
    found["compare"] = trilens.make_report(
        trilens.compare(before, after, blocks), title="transformer → ternary"
    ).save(folder / "compare.html")
    return found


@contextmanager
def explorer() -> Iterator[str]:
    """`trilens serve` of the transformer on a free port: the URL of a run without a head."""
    command = [sys.executable, "-m", "trilens", "serve", str(trilens.demo_path("transformer"))]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = next(filter(None, (re.search(r"http://\S+/", line) for line in process.stderr)))
        state = {"prompt": EXPLORED, "edit": "ablate:attn.z@2#5", "layer": 2, "head": 5, "new": 8}
        yield f"{found[0]}?{urlencode(state)}"
    finally:
        process.terminate()
        process.wait(60)


def photograph(page: Page, address: str, section: str, name: str, height: int) -> None:
    """A section of a page, under its prompt where there is one; "" is its top."""
    page.set_viewport_size({"width": 1180, "height": height})
    page.goto(address)
    if not address.startswith("file:"):
        page.wait_for_selector("#written", timeout=60_000)  # it runs first
    page.wait_for_selector("html[data-ready='true']")
    page.evaluate(
        """(id) => {
          if (!id) return;
          const strip = document.getElementById("strip");
          const room = strip ? strip.offsetHeight + 16 : 8;
          const top = document.getElementById(id).getBoundingClientRect().top + scrollY - room;
          scrollTo({ top, behavior: "instant" });
        }""",
        section,
    )
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    out = FOLDER / f"{name}.png"
    picture.save(out, optimize=True)
    size = out.stat().st_size
    print(f"{out.relative_to(ROOT)}: {size / 1e3:.0f} kB")
    assert size <= MOST_BYTES, f"{out} is larger than {MOST_BYTES} bytes"


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser_path, "no Chromium on this machine: apt-get install chromium"
    with tempfile.TemporaryDirectory() as name, sync_playwright() as play:
        files = reports(Path(name))
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for scheme, shots in (
            ("light", [("transformer", "heads-softmax", "attention", 860),
                       ("transformer", "layers", "layers", 860),
                       ("compare", "heads", "compare", 760)]),
            ("dark", [("rwkv7", "heads-effective", "effective", 860)]),
        ):  # fmt: skip
            page = browser.new_context(offline=True, color_scheme=scheme).new_page()
            for report, section, out, height in shots:
                photograph(page, files[report].as_uri(), section, out, height)
        page = browser.new_context(color_scheme="light").new_page()
        with explorer() as address:
            photograph(page, address, "", "explorer", 900)
        browser.close()


if __name__ == "__main__":
    main()
