"""A GGUF file as a model of transformers: unpacked by transformers, weight for weight."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from trilens.errors import (
    ConfigError,
    CorruptFileError,
    MemoryShortError,
    ModelNotFoundError,
    UsageError,
)
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.models.completeness import check_complete

__all__ = ["build_gguf", "gguf_bytes", "gguf_path"]


def gguf_path(folder: Any, name: Any) -> Path:
    """The file of this name in a directory.

    Raises:
        UsageError: no name of a GGUF file, or a place that is no directory.
        ModelNotFoundError: there is no such file.
        ConfigError: the package gguf is not installed.
    """
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".gguf"):
        raise UsageError(
            f"gguf_file {name!r} is not the name of a file: give one such as 'model.gguf', and its "
            "directory as the path"
        )
    place = Path(folder).expanduser() if isinstance(folder, str | Path) else None
    if place is None or not place.is_dir():
        raise UsageError(
            f"gguf_file={name!r} needs a local directory, and {str(folder)!r} is none: download "
            "the file, and give the directory that it is in"
        )
    file = place.resolve() / name
    if not file.is_file():
        raise ModelNotFoundError(f"directory {place} has no file {name}")
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{file} needs the package gguf, which is not installed: pip install gguf"
        )
    return file


def gguf_bytes(file: Path, dtype: str | torch.dtype) -> int:
    """Bytes of the weights once they are unpacked; "auto" is float32.

    Raises:
        CorruptFileError: it is no GGUF file.
    """
    from gguf import GGUFReader

    try:
        elements = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    # The reader trusts the file, and fails in its own ways.
    except Exception as cause:
        raise CorruptFileError(f"{file} is no whole GGUF file: {reason(cause)}") from cause
    target = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return elements * (target.itemsize if isinstance(target, torch.dtype) else 4)


def build_gguf(file: Path, options: Mapping[str, Any]) -> tuple[Any, Any, tuple[str, ...]]:
    """The model in a GGUF file, its tokenizer, and the tensors that the model has no place for.

    Raises:
        ConfigError: an architecture that transformers does not read from GGUF files.
        CorruptFileError: weights are missing, or the file is damaged.
    """
    where, given = file.parent, {"gguf_file": file.name, "local_files_only": True}
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            where, **given, **options, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **given)
    except ImportError as cause:
        raise ConfigError(
            f"{file} needs a package that is not installed: {reason(cause)}"
        ) from cause
    except Exception as cause:
        if is_short_of_memory(cause):
            raise MemoryShortError(
                f"memory ran out while loading {file}: {reason(cause)}"
            ) from cause
        raise ConfigError(
            f"{file} is not read by transformers {transformers.__version__}: {reason(cause)}"
        ) from cause
    check_complete(file, model, report)
    return model.eval(), tokenizer, tuple(sorted(report["unexpected_keys"]))
