"""What results can do: give a table as rows, values for JSON and pandas, show themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from trilens.arrow import arrow_table
from trilens.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Shown", "Tabular"]


class Shown:
    """What shows itself in a notebook.

    How, the report knows, which stands above: `report/registration.py` enters it here.
    """

    __slots__ = ()

    _static: ClassVar[Callable[[object], str] | None] = None
    _figure: ClassVar[Callable[[object, str | None, dict[str, Any]], Any] | None] = None
    _tabulated: ClassVar[Callable[[object], list[dict[str, Any]]] | None] = None
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

    def plot(self, name: str | None = None, **options: Any) -> Any:
        """A matplotlib figure of a picture of the report, for a paper: `.savefig("x.pdf")`.

        Args:
            name: of the picture; the one that says most where not given. A name that is not there
                is answered with those that are.
            options: `layer=` and `head=` of one attention pattern; `token=` of pictures of one
                token over the layers, the last where not given.

        Raises:
            UsageError: matplotlib is not installed, or there is no such picture.
            OutOfRangeError: a layer, head or token that is not there.
        """
        draw = Shown._figure
        if draw is None:
            raise UsageError("nothing draws results here: import trilens first")
        return draw(self, name, options)

    def to_arrow(self) -> pa.Table:
        """The table as Arrow holds it; `polars.from_arrow` and others read it.

        Raises:
            UsageError: there is no table.
        """
        rows = Shown._tabulated
        if rows is None:
            raise UsageError("nothing makes tables here: import trilens first")
        return arrow_table(rows(self))

    def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame; columns of whole numbers are nullable integers.

        Raises:
            UsageError: pandas is not installed, or there is no table.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError(
                "pandas is not installed: pip install 'trilens[pandas]', or use table()"
            ) from error
        whole = {"int64": pandas.Int64Dtype()}
        return self.to_arrow().to_pandas(types_mapper=lambda kind: whole.get(str(kind)))


class Tabular(Shown):
    """A result with a table."""

    __slots__ = ()

    def table(self) -> list[dict[str, Any]]:
        """Rows of plain values, all with the same keys."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The whole result as JSON can hold it."""
        raise NotImplementedError

    def to_arrow(self) -> pa.Table:
        """The table as Arrow holds it; `polars.from_arrow` and others read it."""
        return arrow_table(self.table())
