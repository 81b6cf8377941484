"""The table of a comparison as a Parquet file.

Parquet rather than CSV: a layer that is None, an infinite value and every digit come back as they
were, and other programs read the columns without parsing text. pyarrow writes it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from trilens.analysis.comparison.rows import Row
from trilens.errors import CorruptFileError, ModelNotFoundError, WriteError

__all__ = ["read_rows", "write_rows", "write_whole"]

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
    write_whole(path, lambda file: pq.write_table(table, file))


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


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside its place and rename it, so that there is never half of one.

    Raises:
        WriteError: it can't be written; nothing is left of it.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        # mkstemp makes files for their owner alone; this one is an ordinary result.
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True) if temporary else None
        why = error.strerror or type(error).__name__
        raise WriteError(f"{path} can't be written: {why}; name another place") from error
