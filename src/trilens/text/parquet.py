"""A text column of a Parquet file, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trilens.errors import TextError
from trilens.io.guarded import open_regular
from trilens.io.messages import listed, reason
from trilens.io.parquet import bounded_batches

__all__ = ["parquet_texts"]


def parquet_texts(file: Path, column: str) -> Iterator[str]:
    """The texts of a column, in the order of its rows; empty cells are left out.

    Raises:
        TextError: no readable Parquet file, no such column, no text, or text that is more than 100
            times as long as its file.
    """
    with open_regular(file, TextError) as stream:
        try:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            if column not in names:
                raise TextError(f"{file} has no column {column!r}: its columns are {listed(names)}")
            kind = table.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise TextError(f"{file}: column {column!r} holds {kind}, not text")
            for batch in bounded_batches(table, file, (column,), TextError):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except UnicodeDecodeError as error:
            raise TextError(f"{file}: column {column!r} holds text that is not UTF-8") from error
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise TextError(f"{file} is not a readable Parquet file: {reason(error)}") from None
