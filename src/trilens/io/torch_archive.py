"""A `.pth` file: a zip of one pickle and the records that it speaks of, each checked.

Records that are stored as they are stay in the file and are mapped; compressed ones are expanded,
to the size that the archive states and no further.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trilens.errors import CorruptFileError, UnsafeFormatError
from trilens.io.guarded import open_regular
from trilens.io.messages import clip, reason
from trilens.io.tensor_pickle import StorageClaim, TensorClaim, read_pickle

__all__ = ["read_torch_archive"]

_PICKLE_START = b"\x80"
_PICKLE_BYTES = 1 << 26
# What compression may make of a file: weights are noise, and shrink by little.
_MOST_TIMES = 4
_ALWAYS_BYTES = 1 << 26
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_NAMES_SHOWN = 5


def read_torch_archive(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file is run.

    Every record's checksum is verified, but in an archive that torch was told to write without.

    Args:
        path: what `torch.save` made of a dict of tensors, or the same records packed again.

    Raises:
        UnsafeFormatError: a bare pickle, or one that holds anything but tensors by name.
        CorruptFileError: truncated, damaged, or it contradicts itself.

    Memory: compressed records, and tensors whose place in the file is not aligned; others are
        mapped.
    """
    with open_regular(path) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            bare = file.read(1) == _PICKLE_START
            if size == 0 or bare or not zipfile.is_zipfile(file):
                if bare:
                    raise UnsafeFormatError(f"{path} is a bare pickle, not torch's zip of tensors")
                raise _damaged(path, "its zip is truncated or damaged")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            with zipfile.ZipFile(file) as archive:
                records = _Archive(path, data, archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as cause:
            raise _damaged(path, reason(cause)) from cause
    return records.tensors()


def _damaged(path: Path, why: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is no readable .pth file: {why}")


class _Archive:
    """The records of a zip."""

    def __init__(self, path: Path, data: mmap.mmap, entries: list[zipfile.ZipInfo]) -> None:
        self.path = path
        self.data = data
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) < len(entries):
            raise self.damaged("it has two records of one name")
        self.limit = _ALWAYS_BYTES + _MOST_TIMES * len(data)
        self.checked = any(entry.CRC for entry in entries)
        total = sum(entry.file_size for entry in entries)
        if total > self.limit:
            raise self.damaged(
                f"its records say that they expand to {total} bytes, allowed are {self.limit}"
            )

    def damaged(self, why: str) -> CorruptFileError:
        return _damaged(self.path, why)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        pickles = [name for name in self.entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise self.damaged(f"it has {len(pickles)} records data.pkl, not one")
        home = pickles[0].removesuffix("data.pkl")
        if self.entries[pickles[0]].file_size > _PICKLE_BYTES:
            raise self.damaged(f"its pickle has more than {_PICKLE_BYTES} bytes")
        order = self.entries.get(f"{home}byteorder")
        if order is not None and bytes(self.record(order)) != b"little":
            raise self.damaged("it was written on a big-endian machine")
        found = read_pickle(bytes(self.record(self.entries[pickles[0]])), str(self.path))
        claims = _named(found, self.path)
        total = sum(math.prod(c.size) * c.storage.dtype.itemsize for c in claims.values())
        if total > self.limit:
            raise self.damaged(f"its tensors take {total} bytes, allowed are {self.limit}")
        storages: dict[StorageClaim, Tensor] = {}
        for claim in claims.values():
            if claim.storage not in storages:
                storages[claim.storage] = self._storage(claim.storage, home)
        for entry in self.entries.values():
            self._check_unused(entry, home, storages)
        return {
            name: storages[c.storage].as_strided(c.size, c.stride, c.offset)
            for name, c in claims.items()
        }

    def _storage(self, claim: StorageClaim, home: str) -> Tensor:
        entry = self.entries.get(f"{home}data/{claim.key}")
        if entry is None:
            raise self.damaged(f"its record data/{clip(claim.key)} is missing")
        if entry.file_size != claim.numel * claim.dtype.itemsize:
            raise self.damaged(
                f"its record data/{claim.key} has {entry.file_size} bytes, not {claim.numel} "
                f"numbers of {claim.dtype}"
            )
        if claim.numel == 0:
            return torch.empty(0, dtype=claim.dtype, device="cpu")
        return torch.frombuffer(self.record(entry), dtype=claim.dtype)

    def _check_unused(
        self, entry: zipfile.ZipInfo, home: str, used: dict[StorageClaim, Tensor]
    ) -> None:
        """A record that no tensor reads says as much of the file's state as any other."""
        if entry.filename not in {f"{home}data/{claim.key}" for claim in used}:
            self.record(entry)

    def record(self, entry: zipfile.ZipInfo) -> Any:
        """A record's bytes: a view of the file, or expanded."""
        if entry.flag_bits & _ENCRYPTED:
            raise self.damaged(f"its record {clip(entry.filename)} is encrypted")
        begin = entry.header_offset
        header = self.data[begin : begin + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise self.damaged(f"its record {clip(entry.filename)} has no header")
        _, n_name, n_extra = _LOCAL_HEADER.unpack(header)
        begin += _LOCAL_HEADER.size + n_name + n_extra
        stored = memoryview(self.data)[begin : begin + entry.compress_size]
        if len(stored) != entry.compress_size:
            raise self.damaged(f"its record {clip(entry.filename)} is truncated")
        content: Any = stored
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            content = self._expanded(entry, stored)
        elif entry.compress_type != zipfile.ZIP_STORED:
            raise self.damaged(
                f"its record {clip(entry.filename)} is compressed in a way that is not read: store "
                "or deflate"
            )
        if len(content) != entry.file_size:
            raise self.damaged(f"its record {clip(entry.filename)} is not as long as it says")
        if self.checked and zlib.crc32(content) != entry.CRC:
            raise self.damaged(f"the checksum of its record {clip(entry.filename)} is wrong")
        # Numbers are read where they lie only from an address that is a multiple of their size.
        return content if content is not stored or begin % 8 == 0 else bytearray(content)

    def _expanded(self, entry: zipfile.ZipInfo, stored: memoryview) -> bytearray:
        expander = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            return bytearray(expander.decompress(stored, entry.file_size + 1))
        except zlib.error as cause:
            raise self.damaged(f"its record {clip(entry.filename)}: {cause}") from cause


def _named(found: Any, path: Path) -> dict[str, TensorClaim]:
    if not isinstance(found, dict):
        raise UnsafeFormatError(f"{path} holds a {_kind(found)}, not tensors by name")
    unnamed = [clip(name) for name in found if not isinstance(name, str)]
    if unnamed:
        raise UnsafeFormatError(
            f"{path} holds entries whose names are no text: {', '.join(unnamed[:_NAMES_SHOWN])}"
        )
    strange = [name for name, value in found.items() if not isinstance(value, TensorClaim)]
    if strange:
        raise UnsafeFormatError(
            f"{path} holds entries that are not plain tensors: {clip(strange[:_NAMES_SHOWN], 300)}"
        )
    return found


def _kind(found: Any) -> str:
    return "tensor" if isinstance(found, TensorClaim) else type(found).__name__
