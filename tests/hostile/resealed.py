"""Damage under a hash that fits it: what a file says of itself is made true again, as whoever
writes a hostile file would do, so that damage reaches the readers behind the hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from trilens.checkpoint.gguf.reader import read_gguf
from trilens.checkpoint.gguf.validation import (
    HASH_KEY,
    HEAD_HASH_KEY,
    before_hash,
    data_hash,
    head_hash,
)
from trilens.errors import TrilensError
from trilens.io.listing import list_files
from trilens.io.sealed import NO_HASH, sealed

__all__ = ["reseal_gguf", "resealed_folder", "resealed_json", "resealed_tensors", "tensors_file"]

_KEY = b'"trilens.sha256":"'


def resealed_json(text: bytes) -> bytes:
    """JSON with the hash of its content; what is no object stays as it is."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            found.pop("sha256", None)
            return sealed(found)
    except (ValueError, RecursionError, TrilensError):
        pass
    return text


def resealed_tensors(data: bytes) -> bytes:
    """A file of `write_tensors` with the hash of its bytes; without a hash, as it is."""
    at = data.find(_KEY) + len(_KEY)
    if at < len(_KEY) or len(data) < at + 64:
        return data
    cleared = data[:at] + NO_HASH.encode() + data[at + 64 :]
    digest = hashlib.sha256(cleared).hexdigest().encode()
    return data[:at] + digest + data[at + 64 :]


def tensors_file(header: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file of a header and the tensors' bytes, with its hash."""
    raw = json.dumps(header, separators=(",", ":")).encode()
    return resealed_tensors(struct.pack("<Q", len(raw)) + raw + data)


def resealed_folder(folder: Path, manifest: Path, text: bytes, key: str) -> None:
    """Write a manifest that lists the files of its folder as they are now.

    Args:
        folder: of the files.
        manifest: where to write.
        text: its JSON.
        key: of the entry that lists the files: by name, or by part where names stand elsewhere.
    """
    try:
        found = json.loads(text)
        claims = found[key]
        names = found["files"] if key == "parts" else {name: name for name in claims}
        for each, name in names.items():
            if (folder / name).is_file():
                claims[each] = list_files(folder, [name])[name]
        text = json.dumps(found).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError, TrilensError):
        pass
    manifest.write_bytes(resealed_json(text))


def reseal_gguf(path: Path) -> None:
    """Put the right hashes into a GGUF file, where it can be read and has a place for them."""
    for key, hash_of in ((HASH_KEY, data_hash), (HEAD_HASH_KEY, head_hash)):
        try:
            file = read_gguf(path)
            digest = hash_of(file)
        except (TrilensError, MemoryError):
            return
        data = path.read_bytes()
        at = data.find(before_hash(key)) + len(before_hash(key))
        if digest is not None and len(before_hash(key)) <= at <= len(data) - 64:
            path.write_bytes(data[:at] + digest.encode() + data[at + 64 :])
