"""What mkdocs calls: pages that are made, beside docs/*.md, which are taken as they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from website.reference import linked
from website.reference import pages as reference_pages
from website.tutorials import EXAMPLES, read_script, tutorial

ROOT = Path(__file__).parents[1]
# Pages of the root, and what they are called in the site.
_PROJECT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\]\((?!http)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """The lists of tutorials and of the reference go where the navigation names their folder."""
    folders = {
        "tutorials/": [f"tutorials/{path.stem}.md" for path in sorted(EXAMPLES.glob("*.py"))],
        "reference/": [f"reference/{page}.md" for page in reference_pages()],
    }

    def filled(part: Any) -> list[Any]:
        if isinstance(part, dict):
            ((title, inside),) = part.items()
            listed = inside if isinstance(inside, list) else [inside]
            pages = [each for one in listed for each in filled(one)]
            return [{title: inside if pages == [inside] else pages}]
        return folders.get(part, [part])

    config.nav = [each for part in config.nav for each in filled(part)]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are made, and the script that searches without a server."""
    made = {
        name: _moved((ROOT / file).read_text(encoding="utf-8")) for file, name in _PROJECT.items()
    }
    for path in EXAMPLES.glob("*.py"):
        made[f"tutorials/{path.stem}.md"] = tutorial(read_script(path.stem))
    made |= {f"reference/{page}.md": text for page, text in reference_pages().items()}
    for name in ("iframe-worker.js", "site.css", "site.js"):
        made[f"assets/{name}"] = (ROOT / "website" / name).read_text(encoding="utf-8")
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def _moved(text: str) -> str:
    """Links of a page of the root, as of a page of the site."""

    def moved(found: re.Match[str]) -> str:
        target = _PROJECT.get(found[1], found[1].removeprefix("docs/"))
        return f"]({target}{found[2] or ''})"

    return _LINK.sub(moved, text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The list of what is public leads to the reference."""
    return linked(markdown) if page.file.src_uri == "api.md" else markdown


def on_pre_build(*, config: Any) -> None:
    """Nothing of an earlier build is left."""
    shutil.rmtree(config.site_dir, ignore_errors=True)
