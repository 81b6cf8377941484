"""Tables that keep every column and digit, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "print_table"]

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


def print_table(
    console: Console,
    columns: Sequence[Column | str],
    rows: Sequence[Sequence[str]],
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
    least = [_least(column, [row[i] for row in rows]) for i, column in enumerate(chosen)]
    for number, group in enumerate(_groups(least, keys, console.width)):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for i in group:
            column = chosen[i]
            table.add_column(
                Text(column.heading),
                justify="left" if column.left else "right",
                no_wrap=not column.fold,
                overflow="fold",
                min_width=least[i],
            )
        for row in rows:
            table.add_row(*(Text(row[i]) for i in group))
        if number:
            console.print()
        console.print(table)


def _least(column: Column, cells: Sequence[str]) -> int:
    lines = (line for cell in (column.heading, *cells) for line in cell.split("\n"))
    width = max(cell_len(line) for line in lines)
    return min(width, column.fold) if column.fold else width


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
