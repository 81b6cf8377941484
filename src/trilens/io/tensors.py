"""Tensors and JSON in one safetensors file, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError
from trilens.io.atomic import write_bytes
from trilens.io.json import json_text, parse_json

__all__ = ["read_tensors", "write_tensors"]

_KEY = "trilens"


def write_tensors(path: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write tensors and a JSON manifest to one safetensors file.

    A tensor that stands under several names is stored once. The file is written whole or not at
    all.

    Raises:
        UsageError: the folder does not exist, or the path is a folder.
        WriteError: the file can't be written; nothing is left of it.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file, for example {path / 'capture.tlc'}")
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist: make it first")
    stored: dict[str, Tensor] = {}
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...], str], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))
        if tensor.numel() and place in places:
            aliases[name] = places[place]
            continue
        places[place] = name
        stored[name] = tensor.detach().to("cpu").contiguous().clone()
    body = json_text({**manifest, "aliases": aliases}, indent=None)
    write_bytes(path, to_bytes(stored, metadata={_KEY: body}))
    return path


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: damaged, of another kind, or of another version.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFileError(f"{path} can't be read as safetensors: {error}") from error
    manifest = parse_json(metadata.get(_KEY, "null"), f"manifest of {path}", non_finite=True)
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise CorruptFileError(f"{path} is a safetensors file, but not a {kind}")
    if manifest.get("version") != version:
        raise CorruptFileError(
            f"{path} is {kind} version {manifest.get('version')}: this trilens reads version "
            f"{version}"
        )
    aliases = manifest.get("aliases") or {}
    if not isinstance(aliases, dict) or not set(aliases.values()) <= set(tensors):
        raise CorruptFileError(f"{path} names tensors that it does not hold")
    return {**tensors, **{name: tensors[of] for name, of in aliases.items()}}, manifest
