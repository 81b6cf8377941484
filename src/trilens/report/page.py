"""What a report is made of, before anything says how it looks: sections of charts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from trilens.errors import UsageError
from trilens.report.patterns import HeadPatterns
from trilens.report.tables import Table

__all__ = ["Block", "Chart", "Heads", "Kind", "LensGrid", "Page", "Profiles", "Section"]

Kind = Literal["lines", "bars", "heatmap", "scatter", "histogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture of columns of a table, which stands behind it.

    Attributes:
        kind: "lines" and "bars" of `y` over `x`; "heatmap" of `y[0]` by `x` and `row`; "scatter" of
            `y[0]` over `x`, named by `label`; "histogram": `y` from `x` to `until`,
            several on top of one another.
        table: what is drawn; columns are named by `Column.name`.
        x: column of the horizontal axis.
        y: columns that are drawn.
        row: of a heatmap, the column of the vertical axis.
        label: column that names a point, where there is one.
        until: of a histogram, the column of a bin's upper edge.
        title: above it; the table's where not given.
        words: below it: what to look for.
        diverging: values have signs: two colours that part at 0.
        log: the vertical axis is logarithmic.
        link: charts of one name move and zoom together.
        marks: of a histogram, places on the horizontal axis with a line.
        scale: smallest and largest value of a heatmap's colours; those of its values if not given.
        width: of the page.

    Raises:
        UsageError: a column that the table has not.
    """

    kind: Kind
    table: Table
    x: str
    y: tuple[str, ...]
    row: str = ""
    label: str = ""
    until: str = ""
    title: str = ""
    words: str = ""
    diverging: bool = False
    log: bool = False
    link: str = ""
    marks: tuple[float, ...] = ()
    scale: tuple[float, float] | None = None
    width: Literal["third", "half", "full"] = "half"

    def __post_init__(self) -> None:
        known = [column.name for column in self.table.columns]
        for name in (self.x, *self.y, self.row, self.label, self.until):
            if name and name not in known:
                raise UsageError(f"chart names column {name!r}: the table has {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Heads:
    """All heads in one picture, and the pattern of one; `summary` has a row per head."""

    patterns: HeadPatterns
    summary: Table


@dataclass(frozen=True, slots=True)
class LensGrid:
    """What each layer would predict after each token: most probable tokens, descending.

    Attributes:
        layers: rows.
        positions: columns.
        texts: of the tokens that stand here, by number.
        top: [layers][positions][k] numbers of `texts`.
        probabilities: theirs.
        table: the same in rows.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    texts: tuple[str, ...]
    top: list[list[list[int]]]
    probabilities: list[list[list[float]]]
    table: Table


@dataclass(frozen=True, slots=True)
class Profiles:
    """Quantities of every layer and token; the page draws those of the chosen token.

    Attributes:
        columns: what each is.
        layers: of each, which have it.
        values: of each, [layers][tokens].
        table: of the last token and of the mean over tokens.
    """

    columns: tuple[Any, ...]
    layers: tuple[tuple[int, ...], ...]
    values: tuple[list[list[float | None]], ...]
    table: Table


Block = Chart | Table | Heads | LensGrid | Profiles


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        blocks: what stands in it, in order.
        words: sentences above them.
        name: of its address in the page; made of the title where not given.
    """

    title: str
    blocks: tuple[Block, ...] = ()
    words: tuple[str, ...] = ()
    name: str = ""

    @property
    def anchor(self) -> str:
        """Its address in the page."""
        return self.name or "-".join("".join(c if c.isalnum() else " " for c in self.title).split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report.

    Attributes:
        title: what it is of.
        sections: in order.
        facts: what stands in the header: name → value.
        command: what makes it again; "" where it was made by a program.
        tokens: of the prompt, where there is one.
        lead: the finding in a sentence.
        notes: what could not be shown, and what to know.
    """

    title: str
    sections: tuple[Section, ...]
    facts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    command: str = ""
    tokens: tuple[str, ...] = ()
    lead: str = ""
    notes: tuple[str, ...] = ()
