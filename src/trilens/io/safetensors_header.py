"""What a safetensors file holds, read from its header alone.

A safetensors file is 8 bytes (length of the header, little-endian), the header (JSON: name → dtype,
shape, offsets) and the tensors' bytes, without gaps. Everything a loader must know before it opens
a file is in the header, so a truncated or malformed checkpoint is refused here, by name, before a
model is built and before memory is taken.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trilens.errors import CorruptFileError
from trilens.io.guarded import open_regular
from trilens.io.json import parse_object
from trilens.io.messages import clip

__all__ = ["SafetensorsHeader", "TensorHeader", "header_of", "read_header"]

# The format's own limit; a larger number is a damaged length, not a header.
_HEADER_LIMIT_BYTES = 100_000_000
# torch's own limit; it also keeps the product of the sizes a number that can be written down.
_RANK_LIMIT = 64

_DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file's header describes it.

    `dtype` is the format's own name ("BF16"), `begin` and `end` count bytes of `file` from its
    start.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A whole header.

    Attributes:
        tensors: The file's tensors, by name, in the order of their bytes.
        metadata: Text by its name.
        head: All bytes up to the first tensor.
    """

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]
    head: bytes


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Read and check one safetensors file's header; no tensor byte is read.

    Returns:
        The file's tensors, by name, in the order of their bytes.

    Raises:
        CorruptFileError: the file is missing, truncated or too long, its header is not valid, or a
            tensor's dtype, shape and offsets contradict each other.
    """
    with open_regular(file) as stream:
        return header_of(file, stream).tensors


def header_of(file: Path, stream: BinaryIO) -> SafetensorsHeader:
    """As `read_header`, of an open file: it stands at its start, and then at its first tensor.

    Raises:
        CorruptFileError: as `read_header`.
    """
    try:
        size_bytes = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CorruptFileError(
                f"{file} is truncated: expected at least 8 bytes, the file has {size_bytes}"
            )
        length = int.from_bytes(prefix, "little")
        if length > _HEADER_LIMIT_BYTES:
            raise CorruptFileError(
                f"{file} is not a safetensors file: its header would take {length} bytes, "
                f"allowed are 2–{_HEADER_LIMIT_BYTES}"
            )
        if 8 + length > size_bytes:
            raise CorruptFileError(
                f"{file} is truncated: the header needs {8 + length} bytes, the file has "
                f"{size_bytes}"
            )
        text = stream.read(length)
    except OSError as cause:
        raise CorruptFileError(f"{file} cannot be read: {cause.strerror or cause}") from cause
    header = parse_object(text, f"{file} has a malformed header: it", unique_keys=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFileError(f"{file} has a malformed header: __metadata__ is not text to text")
    start = 8 + length
    found = [_parse_entry(file, name, entry, start=start) for name, entry in header.items()]
    tensors = sorted(found, key=lambda t: (t.begin, t.end))
    _check_layout(file, tensors, start=start, size_bytes=size_bytes)
    return SafetensorsHeader({t.name: t for t in tensors}, metadata, prefix + text)


def _parse_entry(file: Path, name: str, entry: Any, *, start: int) -> TensorHeader:
    where = f"{file} has a malformed header: tensor {clip(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{where} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CorruptFileError(
            f"{where} has dtype {clip(dtype)}; known are {', '.join(_DTYPE_BITS)}"
        )
    if not _is_sizes(shape) or len(shape) > _RANK_LIMIT:
        raise CorruptFileError(
            f"{where} has shape {clip(shape)}: a list of at most {_RANK_LIMIT} sizes is needed"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptFileError(
            f"{where} has data_offsets {clip(offsets)}, not [begin, end] with begin ≤ end"
        )
    needed_bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if needed_bits != 8 * (offsets[1] - offsets[0]):
        raise CorruptFileError(
            f"{where} of shape {clip(shape)} and dtype {dtype} needs {clip(-(-needed_bits // 8))} "
            f"bytes, its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorHeader(name, dtype, tuple(shape), file, start + offsets[0], start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(file: Path, tensors: list[TensorHeader], *, start: int, size_bytes: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            problem = (
                "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
            )
            raise CorruptFileError(
                f"{file} has a malformed header: tensor {clip(tensor.name)} {problem} "
                f"(begins at byte {tensor.begin}, expected {end})"
            )
        end = tensor.end
    if end != size_bytes:
        problem = "is truncated" if size_bytes < end else "has bytes that no tensor owns"
        raise CorruptFileError(
            f"{file} {problem}: expected {end} bytes, the file has {size_bytes}; fetch it again"
        )
