"""Lines, and tables that keep every column and digit, however narrow the terminal is.

Everything that a report prints leaves through here: names of files and models hold whatever their
authors put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from trilens.printable import one_line
from trilens.report.tables import NOTHING, Column, Table

__all__ = ["Cell", "Column", "print_line", "print_rows", "print_table"]

Cell = str | tuple[str, ...]
"""What stands in a table: a word or a number, or lines of them."""

_GAP = 3  # a space, the edge of SIMPLE_HEAD, a space


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


def print_rows(console: Console, table: Table) -> None:
    """Print a table as `print_table` does; its title and notes are left to the caller."""
    print_table(console, table.columns, table.cells(), keys=table.keys)


def print_table(
    console: Console,
    columns: Sequence[Column | str],
    rows: Sequence[Sequence[Cell]],
    *,
    keys: int = 1,
) -> None:
    """Print a table; where it is wider than the console, as several under one another.

    Headings are broken between words first; then columns move to a further table, which begins
    with the keys again. Cells are folded last, and only those of columns that may be; no digit and
    no column is cut.

    Args:
        console: where to.
        columns: a heading alone is a column of numbers.
        rows: a cell for each column.
        keys: the first columns, which name a row and so stand in each of the tables.
    """
    chosen = [Column(each) if isinstance(each, str) else each for each in columns]
    headings = [one_line(column.heading) for column in chosen]
    cells = [[_printable(cell) for cell in row] for row in rows]
    bodies = [_width("", *(row[i] for row in cells)) for i in range(len(chosen))]
    whole = [max(body, _width(text)) for body, text in zip(bodies, headings, strict=True)]
    least = []
    for column, heading, body in zip(chosen, headings, bodies, strict=True):
        cell = min(body, column.fold) if column.fold else body
        least.append(max(cell, _width(*heading.split())))
    # A name stays in one piece where a column of numbers has room beside it.
    unfolded = [max(each) for each in zip(least[:keys], bodies[:keys], strict=True)]
    beside = max(least[keys:], default=0)
    if sum(unfolded) + _GAP * keys + beside <= console.width:
        least[:keys] = unfolded
    for number, group in enumerate(_groups(least, keys, console.width)):
        sizes = [[each[i] for i in group] for each in (least, whole)]
        folded = [chosen[i].fold > 0 for i in group]
        widths = _grown(sizes[0], sizes[1], folded, console.width)
        table = Drawn(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for i, width in zip(group, widths, strict=True):
            justify: Literal["left", "right"] = "left" if chosen[i].left else "right"
            table.add_column(Text(headings[i]), justify=justify, width=width, overflow="fold")
        for row in cells:
            # What has nothing to say beside its name stands in the first table alone.
            if not number or any(row[i].strip(NOTHING) for i in group[keys:]):
                table.add_row(*(Text(row[i]) for i in group))
        if number:
            console.print()
        console.print(table)


def _printable(cell: Cell) -> str:
    return "\n".join(map(one_line, (cell,) if isinstance(cell, str) else cell))


def _width(*cells: str) -> int:
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


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


def _grown(
    least: Sequence[int], whole: Sequence[int], folded: Sequence[bool], width: int
) -> list[int]:
    """Widths within the console: headings in one line where they fit, then folded cells wider."""
    widths = list(least)
    left = width - sum(widths) - _GAP * (len(widths) - 1)
    for i in sorted(range(len(widths)), key=lambda i: whole[i] - least[i]):
        if not folded[i] and whole[i] - least[i] <= left:
            left -= whole[i] - least[i]
            widths[i] = whole[i]
    growing = [i for i, each in enumerate(folded) if each and widths[i] < whole[i]]
    while left > 0 and growing:
        for i in growing[:left]:
            widths[i] += 1
            left -= 1
        growing = [i for i in growing if widths[i] < whole[i]]
    return widths
