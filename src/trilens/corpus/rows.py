"""Rows of a store's shards by the number of their token: mapped, or read into given memory."""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from trilens.corpus.coding import SCALE, decoded, stored_dtype
from trilens.corpus.manifest import StoredSite, StoreManifest
from trilens.corpus.names import shard_name, tokens_name
from trilens.errors import CorruptFileError
from trilens.io.guarded import OpenFile, open_regular
from trilens.io.safetensors_header import TensorHeader, header_of

__all__ = ["Piece", "RowFiles", "value_dtype"]

_OPEN_FILES = 64
_DTYPES = {"I8": torch.int8, "I32": torch.int32, "F16": torch.float16}
_DTYPES |= {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one shard: from `begin` to before `end`, counted in that shard."""

    shard: int
    begin: int
    end: int


@dataclass(slots=True)
class _Shard:
    path: Path
    headers: dict[str, TensorHeader]
    file: OpenFile
    map: mmap.mmap | None = None


@dataclass(slots=True)
class RowFiles:
    """The shards of a store, opened when they are read; the last 64 stay open.

    Args:
        folder: of the store.
        manifest: of the store.
    """

    folder: Path
    manifest: StoreManifest
    starts: tuple[int, ...] = ()
    _open: OrderedDict[str, _Shard] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.starts = (0, *accumulate(self.manifest.shards))

    def __getstate__(self) -> tuple[Path, StoreManifest]:
        return self.folder, self.manifest  # files are opened anew in another process

    def __setstate__(self, state: tuple[Path, StoreManifest]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces of shards that a range of tokens is made of."""
        shard = bisect_right(self.starts, begin) - 1
        while begin < end:
            last = min(end, self.starts[shard + 1])
            first = self.starts[shard]
            yield Piece(shard, begin - first, last - first)
            begin, shard = last, shard + 1

    def mapped(self, site: StoredSite, piece: Piece) -> Tensor:
        """Values of a piece, float32 of int8: a view of the mapped file where none is decoded."""
        codes = self._view(shard_name(piece.shard), site.tensor, piece)
        if site.dtype != "int8":
            return codes
        return decoded(codes, self._view(shard_name(piece.shard), site.tensor + SCALE, piece))

    def token_ids(self, piece: Piece) -> Tensor:
        """Token ids of a piece, int32: a view of the mapped file."""
        return self._view(tokens_name(piece.shard), "token_ids", piece)

    def read(self, site: StoredSite, piece: Piece, into: Tensor) -> None:
        """Read values of a piece into memory: of the stored dtype, float32 of int8.

        Shapes: into [end − begin, …], contiguous
        """
        if site.dtype != "int8":
            self._fill(piece, site.tensor, into)
            return
        codes = torch.empty(into.shape, dtype=torch.int8, device="cpu")
        scales = torch.empty(len(into), dtype=torch.float32, device="cpu")
        self._fill(piece, site.tensor, codes)
        self._fill(piece, site.tensor + SCALE, scales)
        into.copy_(decoded(codes, scales))

    def _fill(self, piece: Piece, name: str, into: Tensor) -> None:
        shard = self._shard(shard_name(piece.shard))
        header = self._header(shard, name)
        row = into[0].nbytes if into.dim() > 1 else into.element_size()
        flat = into.reshape(-1).view(torch.uint8).numpy()
        shard.file.fill(flat, header.begin + piece.begin * row)

    def _view(self, file: str, name: str, piece: Piece) -> Tensor:
        shard = self._shard(file)
        header = self._header(shard, name)
        if not header.size_bytes:
            return torch.empty(header.shape, dtype=_DTYPES[header.dtype], device="cpu")
        with self._lock:
            if shard.map is None:
                with open_regular(shard.path) as stream:
                    # Private: what somebody writes into a tensor does not reach the file.
                    shard.map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = _DTYPES[header.dtype]
        row = header.size_bytes // header.shape[0]
        n = (piece.end - piece.begin) * row // dtype.itemsize
        offset = header.begin + piece.begin * row
        if offset % dtype.itemsize:  # a file with an odd header: torch maps aligned values alone
            with memoryview(shard.map)[offset : offset + n * dtype.itemsize] as part:
                flat = torch.frombuffer(bytearray(part), dtype=dtype)
        else:
            flat = torch.frombuffer(shard.map, dtype=dtype, count=n, offset=offset)
        return flat.reshape(-1, *header.shape[1:])[: piece.end - piece.begin]

    def _shard(self, name: str) -> _Shard:
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
            path = self.folder / name
            with open_regular(path) as stream:
                headers = header_of(path, stream).tensors
            self._open[name] = found = _Shard(path, headers, OpenFile(path))
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return found

    def _header(self, shard: _Shard, name: str) -> TensorHeader:
        if name not in shard.headers or shard.headers[name].dtype not in _DTYPES:
            raise CorruptFileError(
                f"{shard.path} has no tensor {name} as the store's manifest says: validate the "
                "store, and capture again what is damaged"
            )
        return shard.headers[name]


def value_dtype(site: StoredSite) -> torch.dtype:
    """The dtype in which values are given: float32 of int8."""
    return torch.float32 if site.dtype == "int8" else stored_dtype(site.dtype, torch.float32)
