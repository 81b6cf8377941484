"""A converted checkpoint's folder: written whole, with the hashes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trilens.io.atomic import atomic_folder
from trilens.io.listed_folder import check_listed, write_list
from trilens.io.tensors import write_safetensors
from trilens.io.weight_files import SINGLE_NAME, read_headers
from trilens.models.rwkv7.config import RWKV7Config

__all__ = ["MANIFEST_NAME", "validate_conversion", "write_conversion"]

MANIFEST_NAME = "trilens-conversion.json"
_KIND = "trilens-rwkv7-conversion"


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
        write_list(folder, MANIFEST_NAME, _KIND)


def validate_conversion(path: Path) -> tuple[str, ...]:
    """Check a converted checkpoint against its manifest, and the header of its weights.

    Returns, raises: as `check_listed`.
    """
    names = check_listed(path, MANIFEST_NAME, _KIND)
    read_headers(path)
    return names
