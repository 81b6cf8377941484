"""Sizes and hashes of a folder's files, as a manifest lists them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trilens.errors import CorruptFileError
from trilens.io.guarded import sha256_of
from trilens.io.messages import clip
from trilens.io.temporary import is_leftover

__all__ = ["check_files", "extra_files", "list_files"]


def list_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, by its name.

    Raises:
        OSError: a file is missing.
        CorruptFileError: one cannot be read, or is no regular file.
    """
    return {
        name: {"size_bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(names)
    }


def check_files(folder: Path, claims: Mapping[Any, Any]) -> None:
    """Compare files with what `list_files` gave.

    Raises:
        CorruptFileError: a name that leads out of the folder, or a file that is missing or another.
    """
    for name, claim in claims.items():
        _check_file(folder, name, claim)


def extra_files(folder: Path, known: Iterable[str]) -> tuple[str, ...]:
    """Names in a folder that nothing lists; what a running or killed writer has there is none.

    Raises:
        OSError: the folder cannot be listed.
    """
    names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    return tuple(sorted(names - set(known)))


def _check_file(folder: Path, name: Any, claim: Any) -> None:
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
    if not plain or name in {"", ".", ".."}:
        raise CorruptFileError(
            f"{folder} has a manifest that names the file {clip(name)}: only plain names in its "
            "own directory are allowed"
        )
    file = folder / name
    if not file.is_file():
        raise CorruptFileError(f"{file} is missing: the manifest lists it")
    size_bytes = file.stat().st_size
    if not isinstance(claim, dict) or size_bytes != claim.get("size_bytes"):
        expected = claim.get("size_bytes") if isinstance(claim, dict) else claim
        problem = "truncated or of another size"
        raise CorruptFileError(f"{file} is {problem}: {size_bytes} bytes, not {clip(expected)}")
    if sha256_of(file) != claim.get("sha256"):
        raise CorruptFileError(f"{file} is damaged: its content does not fit the manifest's hash")
