"""Tensors and JSON in one safetensors file, written whole or not at all, with a hash of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import CorruptFileError, MemoryShortError, ModelNotFoundError, UsageError
from trilens.io.atomic import AtomicFile, atomic
from trilens.io.guarded import open_regular
from trilens.io.json import json_text, parse_json
from trilens.io.messages import other_version
from trilens.io.safetensors_header import TensorHeader, header_of
from trilens.io.safetensors_layout import layout
from trilens.io.sealed import NO_HASH, unsealed

__all__ = ["read_entry", "read_head", "read_tensors", "write_safetensors", "write_tensors"]

_KEY = "trilens"
_HASH = "trilens.sha256"
_HASHED = "hashed"
_BEFORE_HASH = f'"{_HASH}":"'.encode()
_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write tensors and a JSON manifest to one safetensors file.

    A tensor that stands under several names is stored once. The file is written whole or not at
    all, and names the hash of all its bytes.

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
        stored[name] = tensor
    body = json_text({**manifest, "aliases": aliases, _HASHED: True}, indent=None)
    with atomic(path) as file:
        head = _write(file, stored, {_KEY: body, _HASH: NO_HASH})
        file.put(file.sha256.encode(), head.index(_BEFORE_HASH) + len(_BEFORE_HASH))
    return path


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str:
    """Write a safetensors file whole or not at all, and give its hash.

    Args:
        path: its place.
        tensors: of any device and layout; copied one after another.
        metadata: of the header.

    Raises:
        UsageError: a dtype that the format does not have.
        WriteError: the file can't be written; nothing is left of it.
    """
    with atomic(path) as file:
        _write(file, tensors, metadata)
        return file.sha256


def _write(file: AtomicFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UsageError(f"tensor {name} is {tensor.dtype}, which safetensors cannot hold")
    head, slots = layout(
        [(n, _NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()], metadata
    )
    file.write(head)
    for name in slots:
        file.write(_bytes_of(tensors[name]).data)
    return head


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    flat = tensor.detach().to("cpu").contiguous().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # one value counts as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


def read_entry(path: Path, stream: BufferedReader, name: str, entry: TensorHeader) -> Tensor:
    """One tensor of a safetensors file, from where the stream stands: at its first byte.

    Raises:
        CorruptFileError: of no dtype that is known, cut off, or a file that cannot be read.
        MemoryShortError: larger than memory.
    """
    if entry.dtype not in _DTYPES:
        raise CorruptFileError(f"{path} has tensor {name} of dtype {entry.dtype}")
    try:
        values = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="cpu")
    except (RuntimeError, MemoryError) as cause:
        raise MemoryShortError(
            f"{path} has tensor {name} of {entry.size_bytes} bytes, more than there is "
            "memory for: read it on a larger machine"
        ) from cause
    if values.numel():
        try:
            n_read = stream.readinto(values.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as cause:
            raise CorruptFileError(f"{path} cannot be read: {cause.strerror}") from cause
        if n_read < entry.size_bytes:
            raise CorruptFileError(f"{path} is truncated: tensor {name} is cut off")
    return values


def read_head(path: Path, kind: str, version: int) -> tuple[dict[str, Any], str]:
    """The manifest of what `write_tensors` wrote, and the hash that it names; no tensor is read.

    Raises:
        CorruptFileError: missing, cut off, of another kind, or of another version.
    """
    with open_regular(path) as stream:
        metadata = header_of(path, stream).metadata
    return _manifest(path, metadata, kind, version), metadata.get(_HASH, "")


def _manifest(path: Path, metadata: Mapping[str, str], kind: str, version: int) -> dict[str, Any]:
    manifest = parse_json(metadata.get(_KEY, "null"), f"manifest of {path}", non_finite=True)
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise CorruptFileError(f"{path} is a safetensors file, but not a {kind}")
    if manifest.get("version") != version:
        raise CorruptFileError(other_version(f"{path} is {kind}", manifest.get("version"), version))
    return manifest


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote, and check its hash.

    Returns:
        The tensors, and the manifest. Its entry "hashed" is False for a file from before there
        were hashes.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: damaged, of another kind, or of another version.
        MemoryShortError: a tensor is larger than memory.
    """
    if not path.exists():
        raise ModelNotFoundError(f"file {path} does not exist")
    with open_regular(path) as stream:
        header = header_of(path, stream)
        digest, tensors = hashlib.sha256(), {}
        claim = header.metadata.get(_HASH, "")
        digest.update(unsealed(header.head, _BEFORE_HASH, claim) or b"")
        for name, entry in header.tensors.items():
            tensors[name] = values = read_entry(path, stream, name, entry)
            digest.update(_bytes_of(values).data)
    manifest = _manifest(path, header.metadata, kind, version)
    manifest.setdefault(_HASHED, False)
    if (claim or manifest[_HASHED] is not False) and digest.hexdigest() != claim:
        raise CorruptFileError(f"{path} is damaged: its content does not fit its own hash")
    aliases = manifest.get("aliases") or {}
    held = isinstance(aliases, dict) and all(
        isinstance(of, str) and of in tensors for of in aliases.values()
    )
    if not held:
        raise CorruptFileError(f"{path} names tensors that it does not hold")
    return {**tensors, **{name: tensors[of] for name, of in aliases.items()}}, manifest
