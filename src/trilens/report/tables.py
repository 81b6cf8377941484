"""One table: what a terminal, a page, a notebook and a file of JSON or CSV show of a result."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

from trilens.errors import UsageError

__all__ = ["NOTHING", "Better", "Column", "Table"]

Better = Literal["", "larger", "smaller"]
"""Which values are the good ones; "" where none are."""

NOTHING = "–"
"""What stands where a row has no value."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins so


@dataclass(frozen=True, slots=True)
class Column:
    """What a column is called, and how its cells are set.

    Attributes:
        heading: what stands above, as short as a terminal needs it.
        left: words, not numbers.
        fold: cells may be folded down to this width; 0 for never.
        words: the heading where there is room; `heading` where not given.
        key: its name in JSON and CSV; made of the words where not given.
        unit: of its numbers: "nats", "tokens".
        better: which values are the good ones.
        note: what it is, in a sentence.
        spell: value → what is shown of it; never called with None.
    """

    heading: str
    left: bool = False
    fold: int = 0
    words: str = ""
    key: str = ""
    unit: str = ""
    better: Better = ""
    note: str = ""
    spell: Callable[[Any], str] = str

    @property
    def title(self) -> str:
        """The heading where there is room."""
        return self.words or self.heading

    @property
    def name(self) -> str:
        """Its name in JSON and CSV."""
        return self.key or "_".join(self.title.replace("-", " ").split())

    @property
    def explanation(self) -> str:
        """Note, unit and direction in one line; "" where there is nothing to say."""
        parts = [self.note, f"unit: {self.unit}" if self.unit else ""]
        parts.append(f"{self.better} is better" if self.better else "")
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and rows of plain values.

    Attributes:
        columns: in order.
        rows: a value for each column: text, a number, a truth, or None.
        title: what the table is.
        keys: the first columns, which name a row.
        notes: what to know of all of it.

    Raises:
        UsageError: a row has more or fewer values than there are columns.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    keys: int = 1
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UsageError(
                    f"table {self.title!r} has a row of {len(row)} values for {len(self.columns)} "
                    "columns: give one for each"
                )

    def cells(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [
            [
                NOTHING if value is None else column.spell(value)
                for column, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def values(self) -> list[list[Any]]:
        """The rows as JSON can hold them: null where a number is not finite."""
        return [[_plain(value) for value in row] for row in self.rows]

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows by the names of the columns, as JSON can hold them."""
        names = [column.name for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.values()]

    def csv(self) -> str:
        """The rows as CSV; what a spreadsheet would take for a formula gets an apostrophe."""
        out = StringIO()
        writer = csv.writer(out)
        writer.writerow([column.name for column in self.columns])
        writer.writerows([_guarded(value) for value in row] for row in self.values())
        return out.getvalue()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
