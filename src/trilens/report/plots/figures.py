"""Which picture of a result: the one that says most, or the one that was named."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from trilens.errors import UsageError
from trilens.io.messages import clip
from trilens.numbers import whole_number
from trilens.report.making import page_of
from trilens.report.notebook.models import model_page
from trilens.report.page import Block, Chart, Heads, LensGrid, Page, Profiles
from trilens.report.plots.charts import chart_figure
from trilens.report.plots.style import PaperFigure, styled
from trilens.report.plots.views import (
    heads_figure,
    lens_figure,
    pattern_figure,
    profiles_figure,
)
from trilens.report.tables import Table

__all__ = ["figure_of"]


def figure_of(
    result: object,
    name: str | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    token: int = -1,
) -> PaperFigure:
    """A picture of a result, as the report draws it.

    Args:
        result: what shows itself.
        name: of the picture; the one that says most where not given.
        layer: of one head's pattern, with `head`.
        head: likewise.
        token: of pictures of one token over the layers; negative from the end.

    Raises:
        UsageError: the result has no picture, or none of that name.
        OutOfRangeError: a layer, head or token that is not there.
    """
    page = model_page(result) or page_of(result)
    pictures = dict(_pictures(page))
    if not pictures:
        raise UsageError(
            f"{type(result).__name__} has no picture: table() or to_pandas() gives its numbers"
        )
    if (layer is None) != (head is None):
        raise UsageError("layer and head go together: give both or none")
    block = _named(pictures, name) if name is not None else _main(pictures, one=layer is not None)
    with styled():
        return _drawn(block, page, layer, head, whole_number(token, "token"))


def _drawn(
    block: Block, page: Page, layer: int | None, head: int | None, token: int
) -> PaperFigure:
    if layer is not None and head is not None:
        if not isinstance(block, Heads):
            raise UsageError("layer and head name a pattern, and this picture has none")
        at = whole_number(layer, "layer"), whole_number(head, "head")
        return pattern_figure(block.patterns, *at, page.tokens)
    if isinstance(block, Heads):
        return heads_figure(block)
    if isinstance(block, LensGrid):
        return lens_figure(block, page.tokens)
    if isinstance(block, Profiles):
        return profiles_figure(block, token)
    if isinstance(block, Chart):
        return chart_figure(block)
    raise UsageError("a table is no picture: to_pandas() gives its numbers")


def _pictures(page: Page) -> Iterator[tuple[str, Block]]:
    """Every picture by a name of its own."""
    seen: dict[str, int] = {}
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Table):
                continue
            name = (block.title or block.table.title) if isinstance(block, Chart) else section.title
            name = name.lower()
            seen[name] = seen.get(name, 0) + 1
            yield (name if seen[name] == 1 else f"{name} {seen[name]}"), block


def _main(pictures: dict[str, Block], *, one: bool) -> Block:
    heads = [block for block in pictures.values() if isinstance(block, Heads)]
    if heads:
        return heads[0]
    if one:
        raise UsageError("layer and head name a pattern, and there is no attention here")
    return next(iter(pictures.values()))


def _named(pictures: dict[str, Block], name: object) -> Block:
    if not isinstance(name, str):
        raise UsageError(f"picture {clip(name)} is no name: give one of {', '.join(pictures)}")
    found = pictures.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), pictures, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(map(repr, pictures))
        raise UsageError(f"picture {clip(name)} is not here: {hint}the pictures are {known}")
    return found
