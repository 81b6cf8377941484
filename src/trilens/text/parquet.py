"""A text column of a Parquet file, a bounded number of bytes at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trilens.errors import TextError
from trilens.io.guarded import open_regular
from trilens.io.messages import reason
from trilens.text.parquet_pages import page_headers

__all__ = ["parquet_texts"]

# What a file may expand to: prose shrinks to a tenth, tables of similar lines to a fiftieth.
_MOST_TIMES = 100
_ALWAYS_BYTES = 1 << 25
_BATCH_BYTES = 1 << 25
_BATCH_ROWS = 1024


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
                raise TextError(
                    f"{file} has no column {column!r}: its columns are {', '.join(names)}"
                )
            kind = table.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise TextError(f"{file}: column {column!r} holds {kind}, not text")
            limit, longest = _checked_pages(file, table.metadata, column)
            # Any row may be the longest word of a dictionary.
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))
            size_bytes = 0
            for batch in table.iter_batches(batch_size=rows, columns=[column], use_threads=False):
                size_bytes += batch.nbytes
                if size_bytes > limit:
                    raise _too_long(file, size_bytes, limit)
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except UnicodeDecodeError as error:
            raise TextError(f"{file}: column {column!r} holds text that is not UTF-8") from error
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise TextError(f"{file} is not a readable Parquet file: {reason(error)}") from None


def _checked_pages(file: Path, metadata: pq.FileMetaData, column: str) -> tuple[int, int]:
    """The bytes that are allowed in all, and those of the largest dictionary.

    Raises:
        TextError: the pages are larger.
        ValueError: headers that are damaged.
    """
    total = longest = 0
    with open_regular(file, TextError) as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    limit = _ALWAYS_BYTES + _MOST_TIMES * len(data)
    for chunk in _chunks(metadata, column):
        begin = chunk.dictionary_page_offset
        if begin is None or not 0 < begin < chunk.data_page_offset:
            begin = chunk.data_page_offset
        end = begin + chunk.total_compressed_size
        if not 0 <= begin <= end <= len(data):
            raise ValueError("a column lies outside the file")
        for page in page_headers(data[begin:end]):
            total += page.size_bytes
            longest = max(longest, page.size_bytes if page.is_dictionary else 0)
            if total > limit:
                raise _too_long(file, total, limit)
    return limit, longest


def _chunks(metadata: pq.FileMetaData, column: str) -> Iterator[pq.ColumnChunkMetaData]:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(n) for n in range(group.num_columns))
        yield from (chunk for chunk in chunks if chunk.path_in_schema == column)


def _too_long(file: Path, size_bytes: int, limit: int) -> TextError:
    return TextError(
        f"{file} expands to {size_bytes} bytes of text or more, allowed are {limit}: write its "
        "rows once, not many times, or give them as JSONL"
    )
