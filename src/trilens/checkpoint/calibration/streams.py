"""Residual streams of a text, on disk: memory holds one batch of them.

A stream is one file of float32 [tokens, d_model], batch after batch, written in full or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trilens.errors import CorruptFileError
from trilens.io.atomic import atomic
from trilens.text.token_blocks import batches_by_length

__all__ = ["Batch", "Stream", "batches_of", "pieces_of", "write_stream"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Blocks that run together.

    Attributes:
        ids: int64 [batch, seq].
        start: Where its first token stands in the streams.
    """

    ids: Tensor
    start: int

    @property
    def stop(self) -> int:
        """One past its last token."""
        return self.start + self.ids.numel()


def batches_of(blocks: Sequence[Tensor], batch_size: int, start: int = 0) -> tuple[Batch, ...]:
    """Neighbouring blocks of equal length, numbered through."""
    found = []
    for ids in batches_by_length(blocks, batch_size=batch_size):
        found.append(Batch(ids, start))
        start = found[-1].stop
    return tuple(found)


def pieces_of(batches: Sequence[Batch], tokens: int) -> tuple[Batch, ...]:
    """The same text in smaller batches, of at most so many tokens or of one block."""
    found = []
    for batch in batches:
        count, length = batch.ids.shape
        rows = max(1, tokens // length)
        for first in range(0, count, rows):
            ids = batch.ids[first : first + rows]
            found.append(Batch(ids, batch.start + first * length))
    return tuple(found)


class Stream:
    """A stream that was written.

    Args:
        path: its file.
        width: d_model.

    Raises:
        CorruptFileError: the file is missing or of another size.
    """

    def __init__(self, path: Path, width: int, n_tokens: int) -> None:
        self.path, self.width = path, width
        size = path.stat().st_size if path.is_file() else -1
        if size != 4 * width * n_tokens:
            raise CorruptFileError(
                f"{path} is missing or of another size: begin in a new directory"
            )

    def read(self, batch: Batch) -> Tensor:
        """Shapes: → float32 [batch, seq, d_model]."""
        count = (batch.stop - batch.start) * self.width
        values = np.fromfile(self.path, "<f4", count, offset=4 * self.width * batch.start)
        return torch.from_numpy(values).reshape(*batch.ids.shape, self.width)


def write_stream(
    path: Path, batches: Sequence[Batch], make: Callable[[Batch], Tensor]
) -> tuple[Path, int, str]:
    """Write what `make` gives for each batch; the batches follow one another from 0.

    Returns:
        The path, d_model, and the hash of the content.

    Raises:
        WriteError: no space, no permission.
    """
    width = 0
    with atomic(path) as file:
        for batch in batches:
            hidden = make(batch)
            width = hidden.shape[-1]
            file.write(np.ascontiguousarray(hidden.detach().cpu().numpy(), dtype="<f4").tobytes())
    return path, width, file.sha256
