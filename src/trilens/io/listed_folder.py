"""A folder with a manifest that lists its files, their sizes and hashes."""

from __future__ import annotations

from pathlib import Path

from trilens.errors import CorruptFileError, ModelNotFoundError
from trilens.io.atomic import write_bytes
from trilens.io.listing import check_files, list_files
from trilens.io.sealed import read_sealed, sealed

__all__ = ["check_listed", "write_list"]

_VERSION = 1


def write_list(folder: Path, name: str, kind: str) -> None:
    """List all files of a folder in a manifest beside them.

    Args:
        folder: with everything else in it.
        name: of the manifest.
        kind: what the folder is.

    Raises:
        WriteError: it cannot be written.
    """
    files = list_files(folder, [path.name for path in folder.iterdir()])
    write_bytes(folder / name, sealed({"kind": kind, "version": _VERSION, "files": files}))


def check_listed(folder: Path, name: str, kind: str) -> tuple[str, ...]:
    """Check a folder against its manifest.

    Returns:
        The names of the files that were checked, the manifest's last.

    Raises:
        ModelNotFoundError: no manifest is there.
        CorruptFileError: says which file is damaged, and how.
    """
    if not (folder / name).is_file():
        raise ModelNotFoundError(f"{folder} has no {name}: it was written without hashes")
    manifest, _ = read_sealed(folder / name)
    files = manifest.get("files")
    if manifest.get("kind") != kind or not isinstance(files, dict):
        raise CorruptFileError(f"{folder / name} is not the manifest of a {kind}")
    check_files(folder, files)
    return (*files, name)
