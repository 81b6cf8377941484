"""What results can do: give a table as rows, values for JSON and pandas, show themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from trilens.errors import UsageError

__all__ = ["Shown", "Tabular"]


class Shown:
    """What shows itself in a notebook.

    How, the report knows, which stands above: `report/registration.py` enters it here.
    """

    __slots__ = ()

    _static: ClassVar[Callable[[object], str] | None] = None
    _interactive: ClassVar[Callable[[object, dict[str, Any]], None] | None] = None

    def _repr_html_(self) -> str | None:
        """A picture and a table, without scripts; None where there is nothing to draw."""
        render = Shown._static
        return None if render is None else render(self)

    def show(self, **options: Any) -> None:
        """Show the report in a notebook, as it opens from a file.

        Args:
            options: of `make_report`: `lens=` of a capture, `title=`, `facts=`.

        Raises:
            UsageError: not in a notebook, or nothing that a report is made of.
        """
        display = Shown._interactive
        if display is None:
            raise UsageError("nothing shows results here: import trilens first")
        display(self, options)


class Tabular(Shown):
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
