"""Reading a GGUF file back, every byte of its ternary tensors."""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np

from trilens.checkpoint.gguf.formats import FLOAT_TYPES, FORMATS, ROUNDED_TYPES, row_spans
from trilens.checkpoint.gguf.reader import STRING_TYPE, GgufEntry, GgufFile, read_gguf
from trilens.checkpoint.gguf.report import GgufReport, GgufTensor
from trilens.errors import CorruptFileError
from trilens.io.messages import clip
from trilens.io.paths import as_path
from trilens.io.sealed import NO_HASH, unsealed
from trilens.ternary.codecs.packing import Codec

__all__ = [
    "HASH_KEY",
    "HEAD_HASH_KEY",
    "N_HASHES_KEY",
    "before_hash",
    "data_hash",
    "head_hash",
    "validate_gguf",
]

HASH_KEY = "trilens.tensor_data.sha256"
"""The key under which a file names the hash of all bytes from its first tensor to its end."""


HEAD_HASH_KEY = "trilens.metadata.sha256"
"""The key of the hash of all bytes before the first tensor; with `HASH_KEY` it covers the file."""

N_HASHES_KEY = "trilens.n_hashes"
"""The key that says how many hashes there are."""

_CHUNK_BYTES = 1 << 22


def validate_gguf(path: str | os.PathLike[str]) -> GgufReport:
    """Check a GGUF file: its header, each ternary tensor's codes and scales, and its hash.

    Args:
        path: a file of this or another program, with tensors of the types F32, F16, BF16, Q8_0,
            Q4_0, TQ1_0, TQ2_0 and Q2_0.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: says which tensor is damaged, and how: a code that is no trit, a scale
            that is NaN or Inf, offsets that overlap, a file that is cut off, another hash.
    """
    file = read_gguf(as_path(path))
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CorruptFileError(f"{path} names no architecture (general.architecture)")
    if not file.tensors:
        raise CorruptFileError(f"{path} holds no tensors")
    tensors = tuple(_checked(file, entry) for entry in file.tensors.values())
    claim = file.metadata.get(HASH_KEY)
    if claim is not None and data_hash(file) != claim:
        raise CorruptFileError(
            f"{path} is damaged: its tensors do not have the hash {clip(claim)} that it names"
        )
    of_head = file.metadata.get(HEAD_HASH_KEY)
    # Said twice, so that one wrong bit in a key's name does not pass for a file without a hash.
    whole = of_head is not None or N_HASHES_KEY in file.metadata
    if whole and (claim is None or head_hash(file) != of_head):
        raise CorruptFileError(f"{path} is damaged: its metadata do not fit their own hash")
    return GgufReport(architecture, tensors, hash_checked=claim is not None, whole_checked=whole)


def before_hash(key: str) -> bytes:
    """What stands in a file directly before the hash of this key."""
    name = key.encode()
    kind, length = STRING_TYPE.to_bytes(4, "little"), len(NO_HASH).to_bytes(8, "little")
    return len(name).to_bytes(8, "little") + name + kind + length


def data_hash(file: GgufFile) -> str:
    """The hash of all bytes from the first tensor to the file's end."""
    digest = hashlib.sha256()
    size_bytes = file.content.size_bytes
    for begin in range(file.data_begin, size_bytes, _CHUNK_BYTES):
        digest.update(file.content.bytes(begin, min(begin + _CHUNK_BYTES, size_bytes)).data)
    return digest.hexdigest()


def head_hash(file: GgufFile) -> str | None:
    """The hash of all bytes before the first tensor, as they were before it was put in.

    None where the file does not name it once.
    """
    head = file.content.bytes(0, file.data_begin).tobytes()
    before = unsealed(head, before_hash(HEAD_HASH_KEY), str(file.metadata.get(HEAD_HASH_KEY)))
    return None if before is None else hashlib.sha256(before).hexdigest()


def _checked(file: GgufFile, entry: GgufEntry) -> GgufTensor:
    size_bytes = entry.end - entry.begin
    if entry.type_id in FLOAT_TYPES:
        return GgufTensor(entry.name, FLOAT_TYPES[entry.type_id][0], entry.shape, size_bytes)
    if entry.type_id in ROUNDED_TYPES:
        name, _, block_bytes = ROUNDED_TYPES[entry.type_id]
        _check_scales(file, entry, block_bytes)
        return GgufTensor(entry.name, name, entry.shape, size_bytes)
    codec = next(known.codec for known in FORMATS.values() if known.type_id == entry.type_id)
    zeros, levels = _count_zeros(file, entry, codec)
    sparsity = zeros / math.prod(entry.shape)
    return GgufTensor(entry.name, codec.name, entry.shape, size_bytes, sparsity, levels)


def _check_scales(file: GgufFile, entry: GgufEntry, block_bytes: int) -> None:
    """Refuse blocks whose scale, the float16 at their begin, is not finite."""
    step = _CHUNK_BYTES // block_bytes * block_bytes
    for begin in range(entry.begin, entry.end, step):
        raw = file.content.bytes(begin, min(begin + step, entry.end))
        scales = np.ascontiguousarray(raw.reshape(-1, block_bytes)[:, :2]).view("<f2")
        if not np.isfinite(scales).all():
            raise CorruptFileError(
                f"tensor {clip(entry.name)} has a block with a scale that is NaN or Inf"
            )


def _count_zeros(file: GgufFile, entry: GgufEntry, codec: Codec) -> tuple[int, int]:
    """Zeros among the codes, and how many levels these have."""
    *lead, cols = entry.shape
    rows, row_bytes = math.prod(lead), codec.size_bytes((cols,))
    zeros, levels = 0, 3
    for first, last in row_spans(rows, cols):
        raw = file.content.bytes(entry.begin + first * row_bytes, entry.begin + last * row_bytes)
        try:
            trits = codec.decode(raw, (last - first, cols)).trits
        except CorruptFileError as cause:
            raise CorruptFileError(
                f"tensor {clip(entry.name)} from row {first} on: {cause}"
            ) from cause
        zeros += int((trits == 0).sum())
        levels = max(levels, 2 + int(trits.max()))
    return zeros, levels
