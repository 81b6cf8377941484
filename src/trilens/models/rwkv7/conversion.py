"""A converted checkpoint's folder: written whole, with the hashes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trilens.errors import CorruptFileError, ModelNotFoundError
from trilens.io.atomic import atomic_folder, write_bytes
from trilens.io.listing import check_files, list_files
from trilens.io.sealed import read_sealed, sealed
from trilens.io.tensors import write_safetensors
from trilens.io.weight_files import SINGLE_NAME, read_headers
from trilens.models.rwkv7.config import RWKV7Config

__all__ = ["MANIFEST_NAME", "validate_conversion", "write_conversion"]

MANIFEST_NAME = "trilens-conversion.json"
_KIND = "trilens-rwkv7-conversion"
_VERSION = 1


def write_conversion(
    tensors: Mapping[str, Tensor], config: RWKV7Config, target: Path, tokenizer: Any = None
) -> None:
    """Write configuration, weights, a tokenizer and a manifest with their hashes: all or nothing.

    Raises:
        WriteError: a file cannot be written, or another run writes to `target`.
    """
    with atomic_folder(target) as folder:
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_safetensors(folder / SINGLE_NAME, tensors, {"format": "pt"})
        files = list_files(folder, [path.name for path in folder.iterdir()])
        body = {"kind": _KIND, "version": _VERSION, "files": files}
        write_bytes(folder / MANIFEST_NAME, sealed(body))


def validate_conversion(path: Path) -> tuple[str, ...]:
    """Check a converted checkpoint against its manifest, and the header of its weights.

    Returns:
        The names of the files that were checked.

    Raises:
        ModelNotFoundError: no manifest is there.
        CorruptFileError: says which file is damaged, and how.
    """
    manifest_file = path / MANIFEST_NAME
    if not manifest_file.is_file():
        raise ModelNotFoundError(f"{path} has no {MANIFEST_NAME}: it was converted without hashes")
    manifest, _ = read_sealed(manifest_file)
    files = manifest.get("files")
    if manifest.get("kind") != _KIND or not isinstance(files, dict):
        raise CorruptFileError(f"{manifest_file} is not the manifest of a conversion")
    check_files(path, files)
    read_headers(path)
    return (*files, MANIFEST_NAME)
