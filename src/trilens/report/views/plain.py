"""A result's own table, whatever it is of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trilens.report.tables import Column, Table
from trilens.results import Tabular

__all__ = ["plain_table"]


def plain_table(
    found: Tabular,
    title: str = "table",
    *,
    units: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """The rows of `table()`, under the names of their keys.

    Args:
        found: the result.
        title: what the table is.
        units: of a column's numbers, by its key.
    """
    rows = found.table()
    names = list(rows[0]) if rows else []
    texts = {name for name in names if any(isinstance(row[name], str) for row in rows)}
    columns = tuple(
        Column(
            name.replace("_", " "), key=name, spell=_any, left=name in texts,
            unit=units.get(name, ""),
        )
        for name in names
    )  # fmt: skip
    values = tuple(tuple(_cell(row[name]) for name in names) for row in rows)
    return Table(columns, values, title=title)


def _any(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> Any:
    plain = value is None or isinstance(value, str | int | float | bool)
    return value if plain else str(dict(value) if isinstance(value, Mapping) else value)
