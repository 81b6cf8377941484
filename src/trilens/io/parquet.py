"""Columns of a Parquet file, a bounded number of bytes at a time."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trilens.errors import CorruptFileError, TrilensError
from trilens.io.guarded import open_regular
from trilens.io.parquet_pages import column_chunks, page_headers

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["bounded_batches"]

# What a file may expand to: prose shrinks to a tenth, tables of similar lines to a fiftieth.
_MOST_TIMES = 100
_ALWAYS_BYTES = 1 << 25
_BATCH_BYTES = 1 << 25
_BATCH_ROWS = 1024


def bounded_batches(
    table: pq.ParquetFile,
    file: Path,
    columns: Collection[str],
    error: type[TrilensError] = CorruptFileError,
) -> Iterator[pa.RecordBatch]:
    """The rows of some columns, in order.

    Args:
        table: the open file.
        file: its path.
        columns: their names; none of them is nested.
        error: the class to raise.

    Raises:
        TrilensError: of the class `error`: values that are more than 100 times as long as the file.
        ValueError: headers that are damaged; errors of pyarrow come as they are.
    """
    limit, longest = _checked_pages(file, columns, error)
    # Any row may be the longest word of a dictionary.
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))
    size_bytes = 0
    for batch in table.iter_batches(batch_size=rows, columns=list(columns), use_threads=False):
        size_bytes += batch.nbytes
        if size_bytes > limit:
            raise _too_long(file, size_bytes, limit, error)
        yield batch


def _checked_pages(
    file: Path, columns: Collection[str], error: type[TrilensError]
) -> tuple[int, int]:
    """The bytes that are allowed in all, and those of the largest dictionary."""
    total = longest = 0
    with open_regular(file, error) as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    limit = _ALWAYS_BYTES + _MOST_TIMES * len(data)
    for chunk in column_chunks(data):
        if chunk.path not in columns:
            continue
        for page in page_headers(data[chunk.begin : chunk.end]):
            total += page.size_bytes
            longest = max(longest, page.size_bytes if page.is_dictionary else 0)
            if total > limit:
                raise _too_long(file, total, limit, error)
    return limit, longest


def _too_long(file: Path, size_bytes: int, limit: int, error: type[TrilensError]) -> TrilensError:
    return error(
        f"{file} expands to {size_bytes} bytes or more, allowed are {limit}: write its rows once, "
        "not many times"
    )
