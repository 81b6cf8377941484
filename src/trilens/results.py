"""What every result can do: give its table as rows, itself as JSON values, the table to pandas."""

from __future__ import annotations

from typing import Any

from trilens.errors import UsageError

__all__ = ["Tabular"]


class Tabular:
    """A result with a table."""

    __slots__ = ()

    def table(self) -> list[dict[str, Any]]:
        """Rows of plain values, all with the same keys."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame; columns of whole numbers are nullable integers.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError(
                "pandas is not installed: pip install 'trilens[pandas]', or use table()"
            ) from error
        rows = self.table()
        whole = {
            name: "Int64"
            for name in (rows[0] if rows else ())
            if {type(row[name]) for row in rows} - {type(None)} == {int}
        }
        return pandas.DataFrame(rows).astype(whole)
