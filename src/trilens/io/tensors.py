"""Tensors and JSON in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from trilens.errors import CorruptFileError, ModelNotFoundError, UsageError, WriteError

__all__ = ["json_text", "read_tensors", "write_tensors", "write_whole"]

_KEY = "trilens"


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """JSON that every reader takes: NaN and infinities, which it has no word for, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write tensors and a JSON manifest to one safetensors file.

    A tensor that stands under several names is stored once. The file is written beside its place,
    flushed to disk and renamed.

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
    body = json.dumps({**manifest, "aliases": aliases}, ensure_ascii=False)
    data = to_bytes(stored, metadata={_KEY: body})
    write_whole(path, lambda file: file.write(data))
    return path


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside its place, flush it to disk and rename it: there is never half of one.

    Args:
        path: the file's place.
        write: fills the open file.

    Raises:
        WriteError: it can't be written; nothing is left of it, nor where `write` fails otherwise.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        # mkstemp makes files for their owner alone; this one is an ordinary result.
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: OSError) -> WriteError:
    why = error.strerror or type(error).__name__
    return WriteError(f"{path} can't be written: {why}; name another place, or make room")


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
        manifest = json.loads(metadata.get(_KEY, "null"))
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFileError(f"{path} can't be read as safetensors: {error}") from error
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
