"""What a notebook shows: a table and a picture without scripts, or the report in a frame."""

from __future__ import annotations

from html import escape
from importlib import import_module
from typing import Any

from markupsafe import Markup

from trilens.errors import UsageError
from trilens.printable import escaped
from trilens.report.html.report import make_report
from trilens.report.making import page_of
from trilens.report.notebook.models import model_page
from trilens.report.notebook.pictures import chart_picture, mosaic_picture
from trilens.report.page import Block, Chart, Heads, LensGrid, Page, Profiles
from trilens.report.tables import Table

__all__ = ["MOST_BYTES", "framed", "show", "shown_rows", "static_html"]

MOST_BYTES = 100_000
"""Of what stands in a notebook without being asked for."""

_ROWS = 12
_FRAME_HEIGHT = 720
_CELL = "padding:.15rem .6rem;text-align:{};border-bottom:1px solid rgb(128 128 128 / 35%)"


def static_html(result: object) -> str:
    """A heading, a picture and a table; plain text where there is nothing to draw.

    Never raises for want of something to show: a notebook would print the error instead.
    """
    try:
        page = model_page(result) or page_of(result)
    except UsageError:
        return f"<pre>{_text(repr(result))}</pre>"
    pictured = _pictured(page)
    parts = [f"<div><b>{_text(page.title)}</b>", _facts(page)]
    if page.lead:
        parts.append(f"<div>{_text(page.lead)}</div>")
    parts += pictured
    table = _table_of(page)
    if table is not None:
        parts.append(_table(table))
    parts.append("</div>")
    found = "".join(parts)
    if len(found.encode()) <= MOST_BYTES:
        return found
    return "".join(part for part in parts if part not in pictured)[:MOST_BYTES]


def shown_rows(result: object) -> list[dict[str, Any]]:
    """The rows of the table that a notebook shows.

    Raises:
        UsageError: there is none.
    """
    table = _table_of(model_page(result) or page_of(result))
    if table is None:
        raise UsageError(f"{type(result).__name__} has no table")
    return table.to_dict()


def show(result: object, **options: Any) -> None:
    """Show the report of a result in a frame of the notebook.

    Raises:
        UsageError: not in a notebook.
    """
    try:
        display = import_module("IPython.display").display
    except ImportError as error:
        raise UsageError(
            "show() is for a notebook, and IPython is not installed: make_report(…).save(path) "
            "writes a file"
        ) from error
    display({"text/html": framed(make_report(result, **options).html)}, raw=True)


def framed(html: str) -> str:
    """A page inside another, with an origin of its own: its scripts reach nothing outside."""
    return (
        f'<iframe srcdoc="{escape(html, quote=True)}" sandbox="allow-scripts allow-downloads" '
        f'title="trilens report" style="width:100%;height:{_FRAME_HEIGHT}px;border:0"></iframe>'
    )


def _text(text: str) -> str:
    return escape(escaped(text))


def _facts(page: Page) -> str:
    words = " · ".join(f"{name} {value}" for name, value in page.facts.items())
    return f'<div style="opacity:.75">{_text(words)}</div>' if words else ""


def _blocks(page: Page) -> list[Block]:
    return [block for section in page.sections for block in section.blocks]


def _pictured(page: Page) -> list[str]:
    blocks = _blocks(page)
    heads = next((each for each in blocks if isinstance(each, Heads)), None)
    if heads is not None:
        return [mosaic_picture(heads.patterns)]
    chart = next((each for each in blocks if isinstance(each, Chart)), None)
    if chart is None:
        return []
    return [f"<div>{_text(chart.title or chart.table.title)}</div>", chart_picture(chart)]


def _table_of(page: Page) -> Table | None:
    """The table that says most: of the layers, where there are any."""
    blocks = _blocks(page)
    profiles = [each.table for each in blocks if isinstance(each, Profiles)]
    alone = [each for each in blocks if isinstance(each, Table)]
    behind = [each.table for each in blocks if isinstance(each, Chart | LensGrid)]
    return next(iter([*profiles, *alone, *behind]), None)


def _table(table: Table) -> str:
    def cell(tag: str, text: str, i: int, note: str = "") -> str:
        side = "left" if table.columns[i].left else "right"
        title = f' title="{_text(note)}"' if note else ""
        return f'<{tag}{title} style="{_CELL.format(side)}">{_text(text)}</{tag}>'

    shown = table.cells()
    cut = [*shown[:_ROWS]]
    head = "".join(
        cell("th", column.title, i, column.explanation) for i, column in enumerate(table.columns)
    )
    rows = ("".join(cell("td", text, i) for i, text in enumerate(row)) for row in cut)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    left = len(shown) - len(cut)
    more = f"<div>… and {left:,} more rows</div>" if left else ""
    return str(
        Markup('<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">')
        + Markup(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}")
    )
