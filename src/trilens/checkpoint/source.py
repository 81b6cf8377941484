"""A checkpoint that is read: opened once, for whatever is made of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trilens.checkpoint.format.names import (
    CARD_NAME,
    CONFIG_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    QUANT_METHOD,
    SOURCE_CARD_NAME,
)
from trilens.checkpoint.format.shards import MappedFile
from trilens.errors import UsageError
from trilens.io.hub import local_folder
from trilens.io.safetensors_header import TensorHeader
from trilens.io.weight_files import read_weights
from trilens.models.build import read_config, read_settings
from trilens.models.rwkv7 import model as rwkv7

__all__ = ["Checkpoint", "tensor_of"]

_TORCH_DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json")
_SIDE_SUFFIXES = frozenset(
    {".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe", ".spm", ".py"}
)
# Other JSON files may say of the source what is not true of the output (how well it was trained).
_SIDE_FILE = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|generation_config|chat_template"
    r"|tekken|normalizer|(\w+_)?(pre)?processor_config).*\.json|(LICENSE|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)
_NOT_COPIED = frozenset({CONFIG_NAME, CARD_NAME, SOURCE_CARD_NAME, MANIFEST_NAME, JOURNAL_NAME})


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A directory with its configuration and the headers of its weight files.

    Attributes:
        folder: Where it is.
        name: What errors call it: a hub id or a path.
        settings: config.json as it stands.
        config: transformers' configuration.
        files: The weight files.
        headers: Every stored tensor.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    config: Any
    files: tuple[Path, ...]
    headers: dict[str, TensorHeader]
    _mapped: dict[Path, MappedFile] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls,
        src: str | os.PathLike[str],
        *,
        revision: str | None = None,
        ternary: bool = False,
    ) -> Self:
        """Find a checkpoint and read its headers.

        Args:
            src: directory or hub id.
            revision: of a hub id.
            ternary: also take what `ternarize` wrote.

        Raises:
            UsageError: it is quantized already.
            LoadError: it cannot be read, or is damaged; see `trilens.errors`.
        """
        rwkv7.register()
        folder, name = local_folder(src, revision=revision, code=False)
        settings = read_settings(folder)
        packed = settings.get("quantization_config")
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        if packed is not None and not (
            ternary and isinstance(packed, dict) and method == QUANT_METHOD
        ):
            also = ", or one that trilens ternarize wrote" if ternary else ""
            raise UsageError(
                f"{name} is quantized already ({method!r}): give the checkpoint with plain "
                f"weights{also}"
            )
        config, _ = read_config(folder, settings, trusted=False)
        return cls(folder, name, settings, config, *read_weights(folder))

    @property
    def title(self) -> str:
        """Its name, without the path to a folder."""
        return self.folder.name if Path(self.name) == self.folder else self.name

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Tokenizer, generation settings, licence: small files that belong to it."""
        return tuple(
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and (path.suffix in _SIDE_SUFFIXES or _SIDE_FILE.fullmatch(path.name))
            and not path.name.endswith(_WEIGHT_SUFFIXES)
            and not path.name.startswith(".")
            and path.name not in _NOT_COPIED
        )

    @property
    def cards(self) -> tuple[Path, ...]:
        """Its own README.md, if it has one."""
        path = self.folder / CARD_NAME
        return (path,) if path.is_file() else ()

    def mapped(self, file: Path) -> MappedFile:
        """A weight file's bytes; mapped once."""
        if file not in self._mapped:
            self._mapped[file] = MappedFile(file)
        return self._mapped[file]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, by reference to its file.

        Shapes: → [*shape]
        """
        header = self.headers[name]
        return tensor_of(header, self.mapped(header.file))


def tensor_of(header: TensorHeader, file: MappedFile) -> Tensor:
    """A tensor of bytes or of floating-point numbers, by reference to its file.

    Shapes: → [*header.shape]
    """
    raw = file.bytes(header.begin, header.end)
    if header.begin % 8:
        raw = raw.copy()  # old writers do not align; a view of such bytes is undefined
    return torch.from_numpy(raw).view(_TORCH_DTYPES[header.dtype]).reshape(header.shape)
