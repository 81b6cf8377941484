"""A checkpoint that is read: opened once, for whatever is made of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.checkpoint.bitnet import BITNET, BitNet, PackedMatrix, read_bitnet
from trilens.checkpoint.float8 import (
    FLOAT8_DTYPES,
    Float8,
    Float8Matrix,
    is_float8,
    read_float8,
)
from trilens.checkpoint.format.names import (
    CARD_NAME,
    CONFIG_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    QUANT_METHOD,
    SOURCE_CARD_NAME,
)
from trilens.checkpoint.format.shards import MappedFile
from trilens.errors import CorruptFileError, UsageError
from trilens.io.guarded import OpenFile, Scratch, Stamp, read_bytes
from trilens.io.hub import local_folder
from trilens.io.safetensors_header import TensorHeader
from trilens.io.side_files import is_tokenizer_file, side_files
from trilens.io.weight_files import list_weights, listed_headers
from trilens.models.build import read_config, read_settings
from trilens.models.loading import check_fits, load_tokenizer
from trilens.models.rwkv7 import model as rwkv7
from trilens.models.tokenizer_files import tokenizer_files
from trilens.ternary.rules.kernels import parallel_map

__all__ = ["Checkpoint", "as_tensor", "tensor_of"]

_TORCH_DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    **FLOAT8_DTYPES,
}

_CHUNK_BYTES = 1 << 23  # read at once by a thread

_NOT_COPIED = frozenset({CONFIG_NAME, CARD_NAME, SOURCE_CARD_NAME, MANIFEST_NAME, JOURNAL_NAME})


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A directory with its configuration and the headers of its weight files.

    Attributes:
        folder: Where it is.
        name: What errors call it: a hub id or a path.
        settings: config.json as it stands; of a BitNet or float8 one without its quantization.
        config: transformers' configuration.
        files: The weight files.
        headers: Every stored tensor; packed and float8 matrices as the model has them.
        stamps: What config.json and the weight files were like before they were read.
        bitnet: Of a BitNet checkpoint, what is packed.
        float8: Of a float8 checkpoint, what is stored so.
        given_tokenizer: The tokenizer that goes before its own; None where its own is taken.
        given_files: The files of that tokenizer.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    config: Any
    files: tuple[Path, ...]
    headers: dict[str, TensorHeader]
    stamps: dict[Path, Stamp]
    bitnet: BitNet | None = None
    float8: Float8 | None = None
    given_tokenizer: Any = None
    given_files: Mapping[str, bytes] = field(default_factory=dict)
    _opened: dict[Path, OpenFile] = field(default_factory=dict, repr=False)
    _mapped: dict[Path, MappedFile] = field(default_factory=dict, repr=False)
    _scratch: Scratch = field(default_factory=Scratch, repr=False)

    @classmethod
    def open(
        cls,
        src: str | os.PathLike[str],
        *,
        revision: str | None = None,
        ternary: bool = False,
        tokenizer: Any = None,
    ) -> Self:
        """Find a checkpoint and read its headers.

        Args:
            src: directory or hub id.
            revision: of a hub id.
            ternary: also take what `ternarize` wrote.
            tokenizer: goes before its own.

        Raises:
            UsageError: it is quantized already, and not as BitNet or to float8; a tokenizer
                without files.
            LoadError: it cannot be read, or is damaged; see `trilens.errors`.
        """
        rwkv7.register()
        folder, name = local_folder(src, revision=revision, code=False)
        settings = read_settings(folder)
        packed = settings.get("quantization_config")
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        own = ternary and isinstance(packed, dict) and method == QUANT_METHOD
        known = isinstance(packed, dict) and (method == BITNET or is_float8(packed))
        foreign = packed if known else None
        if packed is not None and not own and foreign is None:
            also = ", or one that trilens ternarize wrote" if ternary else ""
            raise UsageError(
                f"{name} is quantized already ({method!r}): give the checkpoint with plain "
                f"weights{also}"
            )
        listing = list_weights(folder)
        stamps = {file: Stamp.of(file) for file in (folder / CONFIG_NAME, *listing.files)}
        config, _ = read_config(folder, settings, trusted=False)
        headers = listed_headers(folder, listing)
        bitnet = float8 = None
        if foreign is not None:
            # Without it the skeleton is that of plain weights, and is checked as such.
            settings = {k: v for k, v in settings.items() if k != "quantization_config"}
            del config.quantization_config
            if method == BITNET:
                bitnet = read_bitnet(name, foreign, headers)
                headers = bitnet.plain_headers(headers)
            else:
                float8 = read_float8(name, foreign, headers)
                headers = float8.plain_headers(headers)
        check_fits(folder, config, headers)
        given = {} if tokenizer is None else tokenizer_files(tokenizer)
        parts = (folder, name, settings, config, listing.files, headers, stamps)
        return cls(*parts, bitnet, float8, tokenizer, given)

    @property
    def is_ternary(self) -> bool:
        """Whether `ternarize` wrote it."""
        packed = self.settings.get("quantization_config")
        return isinstance(packed, dict) and packed.get("quant_method") == QUANT_METHOD

    @property
    def title(self) -> str:
        """Its name, without the path to a folder."""
        return self.folder.name if Path(self.name) == self.folder else self.name

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Small files of its own: generation settings, licence, tokenizer if none was given."""
        return tuple(
            path
            for path in side_files(self.folder)
            if path.name not in _NOT_COPIED
            and not (self.given_files and is_tokenizer_file(path.name))
        )

    @property
    def copied(self) -> dict[str, bytes]:
        """What is copied into an output: `side_files`, and the tokenizer that was given."""
        own = {path.name: read_bytes(path) for path in self.side_files}
        return {**own, **self.given_files}

    @property
    def given_sha256(self) -> str | None:
        """Hash of the given tokenizer's files; None without one."""
        if not self.given_files:
            return None
        digest = hashlib.sha256()
        for name, data in sorted(self.given_files.items()):
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        """The given tokenizer, else its own; None where there is none.

        Raises:
            LoadError: its own cannot be read; see `load_tokenizer`.
        """
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        return load_tokenizer(self.folder, trusted=False)

    @property
    def cards(self) -> tuple[Path, ...]:
        """Its own README.md, if it has one."""
        path = self.folder / CARD_NAME
        return (path,) if path.is_file() else ()

    def check_unchanged(self) -> None:
        """Refuse to go on with files that were replaced or written to since they were opened.

        Raises:
            CorruptFileError: names the file.
        """
        for file, stamp in self.stamps.items():
            if Stamp.of(file) != stamp:
                raise CorruptFileError(
                    f"{file} changed while it was read: what was made of it is of no use; run "
                    "again when nobody writes to it"
                )

    def opened(self, file: Path) -> OpenFile:
        """A weight file's bytes; opened once."""
        if file not in self._opened:
            self._opened[file] = OpenFile(file)
        return self._opened[file]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, read into memory.

        Shapes: → [*shape]

        Raises:
            CorruptFileError: the file was cut off meanwhile, or holds illegal codes.
        """
        packed = self.decoded.get(name)
        if packed is not None:
            codes, scale = (
                tensor_of(part, self.opened(part.file)) for part in (packed.codes, packed.scale)
            )
            return packed.dense(codes, scale)
        header = self.headers[name]
        return tensor_of(header, self.opened(header.file))

    @property
    def decoded(self) -> Mapping[str, PackedMatrix | Float8Matrix]:
        """The matrices that are stored otherwise than the model has them, and decoded when read."""
        if self.bitnet is not None:
            return self.bitnet.matrices
        return {} if self.float8 is None else self.float8.matrices

    def borrowed_tensor(self, name: str) -> Tensor:
        """A stored tensor, valid until the next one is borrowed, of whichever file.

        Shapes: → [*shape]

        Raises: as `tensor`.
        """
        if name in self.decoded:
            return self.tensor(name)
        header = self.headers[name]
        return as_tensor(header, self.borrowed_bytes(header))

    def borrowed_bytes(self, header: TensorHeader) -> NDArray[np.uint8]:
        """A stored tensor's bytes as they lie in its file, valid as long as `borrowed_tensor`.

        Shapes: → [header.size_bytes]

        Raises:
            CorruptFileError: the file was cut off meanwhile.
        """
        file, found = self.opened(header.file), self._scratch.room(header.size_bytes)
        starts = range(0, found.size, _CHUNK_BYTES)
        # A thread alone copies half of what the memory gives.
        parallel_map(lambda at: file.fill(found[at : at + _CHUNK_BYTES], header.begin + at), starts)
        return found

    def mapped_tensor(self, name: str) -> Tensor:
        """A stored tensor, by reference to its file: see `MappedFile` before it is used.

        Shapes: → [*shape]
        """
        if name in self.decoded:
            return self.tensor(name)
        header = self.headers[name]
        if header.file not in self._mapped:
            self._mapped[header.file] = MappedFile(header.file)
        return tensor_of(header, self._mapped[header.file])


def tensor_of(header: TensorHeader, file: OpenFile | MappedFile) -> Tensor:
    """A tensor of bytes or of floating-point numbers: of a mapped file by reference.

    Shapes: → [*header.shape]
    """
    raw = file.bytes(header.begin, header.end)
    if header.begin % 8 and isinstance(file, MappedFile):
        raw = raw.copy()  # old writers do not align; a view of such bytes is undefined
    return as_tensor(header, raw)


def as_tensor(header: TensorHeader, raw: NDArray[np.uint8]) -> Tensor:
    """A tensor over its bytes, which lie at a multiple of its numbers' size.

    Shapes: raw [header.size_bytes] → [*header.shape]
    """
    return torch.from_numpy(raw).view(_TORCH_DTYPES[header.dtype]).reshape(header.shape)
