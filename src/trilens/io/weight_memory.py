"""How much memory the weights of a checkpoint take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from trilens.errors import ConfigError
from trilens.io.json import read_json
from trilens.io.safetensors_header import TensorHeader

__all__ = ["copied_bytes", "memory_bytes"]

# What transformers casts to the model's dtype; integers, booleans and packed weights stay as they
# are stored.
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_CAST_DTYPES = frozenset(_NAMES.values())


def memory_bytes(
    headers: Mapping[str, TensorHeader], folder: Path, dtype: str | torch.dtype = "auto"
) -> int:
    """Bytes that the tensors of `headers` take in memory as `dtype`.

    Floating-point tensors count at the target dtype, everything else as it is stored. "auto" is the
    dtype that config.json in `folder` names, or, without one, the dtype of the files.
    """
    target = _target_bytes(folder, dtype)
    if target is None:
        return sum(tensor.size_bytes for tensor in headers.values())
    return sum(
        math.prod(tensor.shape) * target if tensor.dtype in _CAST_DTYPES else tensor.size_bytes
        for tensor in headers.values()
    )


def copied_bytes(
    headers: Mapping[str, TensorHeader], folder: Path, dtype: str | torch.dtype = "auto"
) -> int:
    """Of `memory_bytes`, those of tensors that are cast: the others stay mapped from their files.

    Mapped pages can leave memory at any time and come back from the file, so that weights may be
    larger than memory.
    """
    target = _target_dtype(folder, dtype)
    if target is None:
        return 0
    return sum(
        math.prod(tensor.shape) * target.itemsize
        for tensor in headers.values()
        if tensor.dtype in _CAST_DTYPES and tensor.dtype != _NAMES.get(target)
    )


def _target_bytes(folder: Path, dtype: str | torch.dtype) -> int | None:
    found = _target_dtype(folder, dtype)
    return None if found is None else found.itemsize


def _target_dtype(folder: Path, dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        config_file = folder / "config.json"
        config = (
            read_json(config_file, ConfigError, non_finite=True) if config_file.is_file() else {}
        )
        dtype = config.get("dtype") or config.get("torch_dtype") or ""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None) if dtype else None
        return found if isinstance(found, torch.dtype) else None
    return dtype if isinstance(dtype, torch.dtype) else None
