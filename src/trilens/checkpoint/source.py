"""A checkpoint that is read: opened once, for whatever is made of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trilens.checkpoint.format.names import CONFIG_NAME, QUANT_METHOD
from trilens.checkpoint.format.shards import MappedFile
from trilens.errors import ConfigError, UsageError
from trilens.io.hub import local_folder
from trilens.io.json import read_json
from trilens.io.safetensors_header import TensorHeader
from trilens.io.weight_files import read_headers, weight_files
from trilens.models.build import read_config
from trilens.models.loading import check_fits
from trilens.models.rwkv7 import model as rwkv7

__all__ = ["Checkpoint", "tensor_of"]

_TORCH_DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


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
        settings = read_json(folder / CONFIG_NAME, ConfigError, non_finite=True)
        _check_dense(settings.get("quantization_config"), name, ternary=ternary)
        config, _ = read_config(folder, trusted=False)
        headers = read_headers(folder)
        check_fits(folder, config, headers)
        return cls(folder, name, settings, config, weight_files(folder), headers)

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


def _check_dense(settings: Any, name: str, *, ternary: bool) -> None:
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if settings is None or (ternary and isinstance(settings, dict) and method == QUANT_METHOD):
        return
    also = ", or one that trilens ternarize wrote" if ternary else ""
    raise UsageError(
        f"{name} is quantized already ({method!r}): give the checkpoint with plain weights{also}"
    )
