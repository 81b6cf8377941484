"""The page as HTML: one file, strict about what may run in it."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from trilens.printable import escaped
from trilens.report.html.data import as_bytes, blocks_of, packed, packed_codes, page_data
from trilens.report.page import Chart, Heads, LensGrid, Page, Profiles
from trilens.report.tables import Table
from trilens.report.words import token_text

__all__ = ["Around", "Rendered", "render_page", "rendered", "shown_command"]

SHOWN_ROWS = 300
"""Rows of a table that stand in the file as HTML; the script draws the others, CSV has all."""

_SCRIPTS = ("core", "tables", "charts", "strip", "lens", "heads")
_LAST = "main"
_LIBRARIES = ("bokeh.min.js", "bokeh-api.min.js")


@dataclass(frozen=True, slots=True)
class Around:
    """What a server shows around a page.

    Attributes:
        template: that extends `page.html`.
        script: that runs with the page's own, before it starts.
        values: that the template takes, besides the page's.
    """

    template: str
    script: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A page as HTML, and the Content-Security-Policy that it names."""

    html: str
    policy: str


def render_page(page: Page, facts: Mapping[str, str]) -> str:
    """The whole file.

    Args:
        page: what to show.
        facts: what the header says besides: versions.
    """
    return rendered(page, facts).html


def rendered(page: Page, facts: Mapping[str, str], around: Around | None = None) -> Rendered:
    """The whole file, and its policy.

    Args:
        page: what to show.
        facts: what the header says besides: versions.
        around: what a server adds; its script may ask that server, and no other.
    """
    library, library_hash = _library()
    script = _script("" if around is None else around.script)
    policy = (
        f"default-src 'none'; script-src {_source(script)} {library_hash}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    if around is not None:
        policy += "; connect-src 'self'"
    number = iter(range(len([*blocks_of(page)])))
    sections = [
        (section, [(next(number), _kind(block), block) for block in section.blocks])
        for section in page.sections
    ]
    template = _template("" if around is None else around.template)
    html: str = template.render(
        {} if around is None else dict(around.values),
        page=page,
        facts={**page.facts, **facts},
        sections=sections,
        shown_rows=SHOWN_ROWS,
        policy=Markup(policy),
        library=Markup(library if _draws(page) else ""),
        data=Markup(packed(as_bytes(page_data(page)))),
        codes=[Markup(each) for each in packed_codes(page)],
        script=Markup(script),
    )
    return Rendered(html, policy)


def shown_command(words: list[str]) -> str:
    """A command as it can be typed again, without what a terminal obeys."""
    return escaped(shlex.join(words))


def _draws(page: Page) -> bool:
    return any(not isinstance(block, Table) for block in blocks_of(page))


def _kind(block: object) -> str:
    kinds = {Table: "table", Chart: "chart", Heads: "heads", LensGrid: "lens", Profiles: "profiles"}
    return next(name for kind, name in kinds.items() if isinstance(block, kind))


def _source(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _library() -> tuple[str, str]:
    """BokehJS, compressed, and the hash under which it may run."""
    folder = files("bokeh") / "server" / "static" / "js"
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in _LIBRARIES)
    return packed(text.encode()), _source(text)


@cache
def _script(added: str) -> str:
    folder = files("trilens.report.html") / "templates"
    parts = [(folder / f"{name}.js").read_text(encoding="utf-8") for name in (*_SCRIPTS, _LAST)]
    parts.insert(len(_SCRIPTS), added)
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


@cache
def _template(source: str) -> Template:
    made = _environment()
    return made.from_string(source) if source else made.get_template("page.html")


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("trilens.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["shown"] = _shown
    found.filters["token"] = token_text
    return found


def _shown(value: Any) -> str:
    """Text as a page may show it: what turns the reading direction as its escape."""
    return escaped(str(value))
