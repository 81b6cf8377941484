"""Rows as an Arrow table: what pandas, polars and other programs read without a copy of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["arrow_table"]


def arrow_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A column for each key of the rows.

    A column of numbers of both kinds holds floats; one whose values have no type in common, text.
    """
    import pyarrow as pa

    names = list(rows[0]) if rows else []
    return pa.table({name: _array([row[name] for row in rows]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain} - {type(None)}
    if kinds == {int, float}:
        plain = [None if value is None else float(value) for value in plain]
    try:
        return pa.array(plain)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in plain], pa.string())


def _plain(value: Any) -> Any:
    """What Arrow knows: lists, Unicode without lone surrogates, and Python's own numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value
