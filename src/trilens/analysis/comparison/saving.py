"""The table of a comparison as a Parquet file.

Parquet rather than CSV: a layer that is None, an infinite value and every digit come back as they
were, and other programs read the columns without parsing text. pyarrow writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from trilens.analysis.comparison.rows import Row
from trilens.errors import CorruptFileError, ModelNotFoundError
from trilens.io.atomic import atomic

__all__ = ["read_rows", "write_rows"]

_NAMES = tuple(field.name for field in fields(Row))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as columns: layer and head int32 or null, three float64, two strings.

    Raises:
        WriteError: the file can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"layer": pa.int32(), "head": pa.int32(), "module": pa.string(), "metric": pa.string()}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in _NAMES])
    columns = {name: [getattr(row, name) for row in rows] for name in _NAMES}
    table = pa.table(columns, schema=schema)
    with atomic(path) as file:
        pq.write_table(table, file)


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read what `write_rows` wrote.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: damaged, or with other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ModelNotFoundError(f"file {path} does not exist")
    try:
        table = pq.read_table(path)
        return tuple(Row(**each) for each in table.to_pylist())
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CorruptFileError(f"{path} is no table of a comparison: {words}") from error
