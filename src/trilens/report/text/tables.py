"""Lines, and tables that keep every column and digit, however narrow the terminal is.

Everything that a report prints leaves through here: names of files and models hold whatever their
authors put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trilens.printable import one_line

__all__ = ["Cell", "Column", "print_line", "print_table"]

Cell = str | tuple[str, ...]
"""What stands in a table: a word or a number, or lines of them."""

_GAP = 3  # a space, the edge of SIMPLE_HEAD, a space


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and how its cells are set.

    Attributes:
        heading: what stands above.
        left: words, not numbers.
        fold: cells may be folded down to this width; 0 for never.
    """

    heading: str
    left: bool = False
    fold: int = 0


def print_line(console: Console, *parts: str, style: str = "", head: str = "") -> None:
    """Print one line.

    Args:
        console: where to.
        parts: its text, in pieces.
        style: how it is set.
        head: text before it, set in bold.
    """
    line = Text.assemble((one_line(head), "bold"), *map(one_line, parts))
    line.stylize(style)
    console.print(line)


def print_table(
    console: Console,
    columns: Sequence[Column | str],
    rows: Sequence[Sequence[Cell]],
    *,
    keys: int = 1,
) -> None:
    """Print a table; where it is wider than the console, as several under one another.

    Args:
        console: where to.
        columns: a heading alone is a column of numbers.
        rows: a cell for each column.
        keys: the first columns, which name a row and so stand in each of the tables.
    """
    chosen = [Column(each) if isinstance(each, str) else each for each in columns]
    headings = [one_line(column.heading) for column in chosen]
    cells = [[_printable(cell) for cell in row] for row in rows]
    whole = [_width(heading, *(row[i] for row in cells)) for i, heading in enumerate(headings)]
    least = [
        min(width, column.fold) if column.fold else width
        for width, column in zip(whole, chosen, strict=True)
    ]
    for number, group in enumerate(_groups(least, keys, console.width)):
        widths = _grown([least[i] for i in group], [whole[i] for i in group], console.width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for i, width in zip(group, widths, strict=True):
            justify: Literal["left", "right"] = "left" if chosen[i].left else "right"
            table.add_column(Text(headings[i]), justify=justify, width=width, overflow="fold")
        for row in cells:
            # What has nothing to say beside its name stands in the first table alone.
            if not number or any(row[i] for i in group[keys:]):
                table.add_row(*(Text(row[i]) for i in group))
        if number:
            console.print()
        console.print(table)


def _printable(cell: Cell) -> str:
    return "\n".join(map(one_line, (cell,) if isinstance(cell, str) else cell))


def _width(*cells: str) -> int:
    return max(cell_len(line) for cell in cells for line in cell.split("\n"))


def _groups(least: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Which columns stand side by side: as many as fit, after the keys."""
    names = list(range(keys))
    groups: list[list[int]] = []
    left = 0
    for i in range(keys, len(least)):
        if not groups or least[i] + _GAP > left:
            groups.append([*names])
            left = width - sum(least[:keys]) - _GAP * (keys - 1)
        groups[-1].append(i)
        left -= least[i] + _GAP
    return groups or [names]


def _grown(least: Sequence[int], whole: Sequence[int], width: int) -> list[int]:
    """Widths that fill the console, folded columns no wider than their cells."""
    widths = list(least)
    left = width - sum(widths) - _GAP * (len(widths) - 1)
    while left > 0 and widths != list(whole):
        for i, most in enumerate(whole):
            if widths[i] < most and left > 0:
                widths[i] += 1
                left -= 1
    return widths
