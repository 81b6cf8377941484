"""A comparison as a folder: its table (Parquet), its arrays (safetensors), a manifest (JSON).

Parquet rather than CSV: a layer that is None, an infinite value and every digit come back as they
were, and other programs read the columns without parsing text. pyarrow writes it.

The manifest names the parts, their sizes and hashes. An older comparison stays whole until the new
one is: new parts lie under other names until the manifest names them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trilens.analysis.comparison.rows import Row
from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError, WriteError
from trilens.io.atomic import atomic, locked_folder, write_bytes
from trilens.io.guarded import open_regular
from trilens.io.listing import check_files, list_files
from trilens.io.messages import clip, other_version
from trilens.io.parquet import bounded_batches
from trilens.io.sealed import read_sealed, sealed
from trilens.io.temporary import is_leftover
from trilens.io.tensors import read_tensors, write_tensors
from trilens.io.typed import typed

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "VERSION",
    "check_place",
    "listed_names",
    "read_folder",
    "write_folder",
]

FORMAT = "trilens.comparison"
VERSION = 1
MANIFEST_NAME = "comparison.json"

_PLAIN = {"table": "table.parquet", "arrays": "arrays.safetensors"}
_OTHER = {part: f"new-{name}" for part, name in _PLAIN.items()}
# Thousands of heads give tens of thousands of rows; a few bytes of Parquet any number.
_MOST_ROWS = 500_000
_NAMES = tuple(field.name for field in fields(Row))


def check_place(folder: Path) -> None:
    """Refuse a place that holds something else than a comparison, whole or not.

    Raises:
        UsageError: a file, or a folder with other files.
        WriteError: it cannot be read.
    """
    try:
        if not folder.is_dir():
            if os.path.lexists(folder):
                raise UsageError(f"{folder} is a file: name a folder")
            return
        names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror}") from error
    if MANIFEST_NAME not in names and names - {*_PLAIN.values(), *_OTHER.values()}:
        raise UsageError(
            f"folder {folder} is not empty and holds no comparison: name a new one, or that of an "
            "earlier comparison"
        )


def write_folder(
    folder: Path, rows: Sequence[Row], arrays: dict[str, Tensor], manifest: dict[str, Any]
) -> None:
    """Write a comparison; one that is there is replaced when the new one is whole.

    Args:
        folder: made where it is missing.
        rows: the table.
        arrays: by name.
        manifest: what is neither; with the entries of `arrays`' own header.

    Raises:
        UsageError: as `check_place`.
        WriteError: a file can't be written, or another run writes one here.
    """
    check_place(folder)
    with locked_folder(folder):
        check_place(folder)
        old = _names_in_use(folder)
        parts = _PLAIN if old != _PLAIN else _OTHER
        for name in {*_PLAIN.values(), *_OTHER.values()} - set((old or {}).values()):
            _remove(folder / name)
        head = {key: manifest[key] for key in ("format", "version", "axes")}
        _write_rows(folder / parts["table"], rows)
        write_tensors(folder / parts["arrays"], arrays, head)
        listed = list_files(folder, parts.values())
        claims = {part: listed[name] for part, name in parts.items()}
        _seal(folder, manifest, parts, claims)
        for name in (old or {}).values():
            _remove(folder / name)
        if parts is _OTHER and _link_all(folder):
            _seal(folder, manifest, _PLAIN, claims)
            for name in _OTHER.values():
                _remove(folder / name)


def read_folder(
    folder: Path,
) -> tuple[dict[str, Any], tuple[Row, ...], dict[str, Tensor], bool]:
    """Manifest, rows and arrays, and whether hashes were checked.

    Raises:
        ModelNotFoundError: no such folder, or one without a manifest.
        CorruptFileError: damaged, of another kind or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ModelNotFoundError(f"{folder} is no saved comparison: it has no {MANIFEST_NAME}")
    manifest, hashed = read_sealed(path, required=False)
    kind = manifest.get("format")
    if kind != FORMAT:
        raise CorruptFileError(f"{path} is {clip(kind)}: a {FORMAT} is needed")
    if manifest.get("version") != VERSION:
        raise CorruptFileError(other_version(f"{path} is {kind}", manifest.get("version"), VERSION))
    claims = manifest.pop("parts", None)
    if claims is not None and not isinstance(claims, dict):
        raise CorruptFileError(f"{path} lists its parts as {clip(claims)}")
    if (claims is not None) != hashed:
        raise CorruptFileError(f"{path} is damaged: its own hash, or those of its parts, are gone")
    names = manifest.pop("files", _PLAIN)
    if names not in (_PLAIN, _OTHER):
        raise CorruptFileError(f"{path} names its files {clip(names)}")
    if claims is not None:
        check_files(folder, {name: claims.get(part) for part, name in names.items()})
    tensors, _ = read_tensors(folder / names["arrays"], FORMAT, VERSION)
    return manifest, _read_rows(folder / names["table"]), tensors, hashed


def listed_names(folder: Path) -> tuple[str, ...]:
    """The files of the comparison in a folder."""
    return (MANIFEST_NAME, *(_names_in_use(folder) or _PLAIN).values())


def _names_in_use(folder: Path) -> dict[str, str] | None:
    """The parts of the comparison that is there; None where there is none that could be lost."""
    try:
        names: dict[str, str] = read_sealed(folder / MANIFEST_NAME, required=False)[0]["files"]
    except (CorruptFileError, KeyError):
        return None
    return names if names in (_PLAIN, _OTHER) else None


def _seal(
    folder: Path, manifest: dict[str, Any], names: dict[str, str], claims: dict[str, Any]
) -> None:
    body = {**manifest, "files": names, "parts": claims}
    write_bytes(folder / MANIFEST_NAME, sealed(body))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path} cannot be removed: {error.strerror}") from error


def _link_all(folder: Path) -> bool:
    """Give the new parts their usual names too; False on file systems without hard links."""
    with suppress(OSError):
        for part, name in _PLAIN.items():
            (folder / name).hardlink_to(folder / _OTHER[part])
        return True
    return False


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as columns: layer and head int32 or null, three float64, two strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [getattr(row, name) for row in rows] for name in _NAMES}
    table = pa.table(columns, schema=_schema())
    with atomic(path) as file:
        pq.write_table(table, file)


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = {"layer": pa.int32(), "head": pa.int32(), "module": pa.string(), "metric": pa.string()}
    return pa.schema([(name, types.get(name, pa.float64())) for name in _NAMES])


def _read_rows(path: Path) -> tuple[Row, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ModelNotFoundError(f"file {path} does not exist")
    try:
        with open_regular(path) as file:
            table = pq.ParquetFile(file)
            if not table.schema_arrow.equals(_schema()):
                raise CorruptFileError(f"{path} has other columns than a comparison")
            batches = bounded_batches(table, path, _NAMES)
            rows: list[Row] = []
            for batch in batches:
                rows += (typed(Row, each) for each in batch.to_pylist())
                if len(rows) > _MOST_ROWS:
                    raise CorruptFileError(f"{path} has more than {_MOST_ROWS} rows")
            return tuple(rows)
    except (pa.ArrowException, OSError, TypeError, ValueError, MemoryError) as error:
        words = " ".join(str(error).split())
        raise CorruptFileError(f"{path} is no table of a comparison: {words}") from error
