"""Tensors that are put aside in a temporary file, and mapped: their pages can leave memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trilens.errors import WriteError
from trilens.io.messages import reason

__all__ = ["KEPT_BYTES", "spilling"]

KEPT_BYTES = 1 << 30
"""What may stay in memory: below, writing to disk would only cost time."""


@contextmanager
def spilling(size_bytes: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Hold tensors that are together larger than memory may be.

    Args:
        size_bytes: of all of them.

    Yields:
        A function that gives a tensor back as it is, or, where all are more than `KEPT_BYTES` and
        it lies in the computer's own memory, mapped from a file. Files are removed at the end, in
        the system's folder for such files (TMPDIR).

    Raises:
        WriteError: no space.
    """
    if size_bytes <= KEPT_BYTES:
        yield lambda tensor: tensor
        return
    with tempfile.TemporaryDirectory(prefix="trilens-") as folder:
        count = 0

        def put_aside(tensor: Tensor) -> Tensor:
            nonlocal count
            if tensor.device.type != "cpu" or not tensor.numel():
                return tensor
            path = Path(folder) / str(count)
            count += 1
            try:
                tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
            except OSError as cause:
                raise WriteError(
                    f"{path} cannot be written: {reason(cause)}; make room, or name another folder "
                    "by TMPDIR"
                ) from cause
            mapped = torch.from_file(
                str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype
            )
            return mapped.reshape(tensor.shape)

        yield put_aside
