"""One tensor out of a file of somebody else: safetensors, or NumPy's .npy without pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trilens.errors import CorruptFileError, MemoryShortError, ModelNotFoundError, UsageError
from trilens.io.guarded import open_regular
from trilens.io.messages import clip, listed
from trilens.io.safetensors_header import header_of
from trilens.io.tensors import read_entry

__all__ = ["SUFFIXES", "read_tensor"]

SUFFIXES = (".safetensors", ".npy")
"""Endings of the files that are read."""


def read_tensor(path: Path, name: str | None = None) -> Tensor:
    """Read one tensor.

    Args:
        path: of a .safetensors or .npy file.
        name: of the tensor; None where the file holds only one.

    Raises:
        ModelNotFoundError: no such file.
        CorruptFileError: damaged, or of a dtype that is not read.
        MemoryShortError: more than there is memory for.
        UsageError: no tensor of that name, or several and none was named.
    """
    if not path.exists():
        raise ModelNotFoundError(f"file {clip(str(path))} does not exist")
    return _read_npy(path) if path.name.endswith(".npy") else _read_safetensors(path, name)


def _read_safetensors(path: Path, name: str | None) -> Tensor:
    with open_regular(path) as stream:
        header = header_of(path, stream)
        names = list(header.tensors)
        if name is None and len(names) != 1:
            raise UsageError(
                f"{path} holds {len(names)} tensors: name one of {listed(names, 8)}, as "
                f"{path.name}:NAME"
            )
        chosen = names[0] if name is None else name
        if chosen not in header.tensors:
            raise UsageError(f"{path} holds no tensor {clip(chosen)}: it has {listed(names, 8)}")
        entry = header.tensors[chosen]
        stream.seek(entry.begin)
        return read_entry(path, stream, chosen, entry)


def _read_npy(path: Path) -> Tensor:
    with open_regular(path) as stream:
        try:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            return torch.from_numpy(np.ascontiguousarray(array))
        except MemoryError as cause:
            raise MemoryShortError(f"{path} holds more than there is memory for") from cause
        except (ValueError, TypeError, OSError, EOFError, SyntaxError) as cause:
            raise CorruptFileError(f"{path} is no .npy file of numbers: {cause}") from cause
