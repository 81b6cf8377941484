"""The JSON of a sweep's table, as it is shipped: format, version, versions of libraries, rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trilens.errors import CorruptFileError

__all__ = ["read_sweep"]


def read_sweep(
    data: dict[str, Any], form: str, version: int, row: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """The attributes of a table, from its JSON.

    Args:
        data: what was read.
        form: the format that it must name.
        version: and its version.
        row: makes a row of its plain form.

    Raises:
        CorruptFileError: another format or version, or not whole.
    """
    if data.get("format") != form or data.get("version") != version:
        raise CorruptFileError(f"not {form} version {version}")
    try:
        rows = tuple(row(each) for each in data["rows"])
        return {"transformers": data["transformers"], "torch": data["torch"], "rows": rows}
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{form} is not whole: {error}") from error
