"""What stands between two blocks on a text, on disk: memory holds one batch of it.

A stream is one file of float32, row after row of each batch, written in full or not at all; of a
residual stream alone that is [tokens, d_model].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trilens.checkpoint.calibration.handover import Carried, Form, Key
from trilens.errors import CorruptFileError
from trilens.io.atomic import atomic
from trilens.text.token_blocks import batches_by_length

__all__ = ["Batch", "Stream", "batches_of", "first_tokens", "pieces_of", "write_stream"]


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


def first_tokens(batches: Sequence[Batch], tokens: int) -> tuple[Batch, ...]:
    """The first batches, as many as hold so many tokens, and at least one."""
    taken = takewhile(lambda pair: pair[1] < tokens, zip(batches, _before(batches), strict=True))
    return tuple(batch for batch, _ in taken) or tuple(batches[:1])


def _before(batches: Sequence[Batch]) -> list[int]:
    return [0, *accumulate(batch.ids.numel() for batch in batches)][: len(batches)]


class Stream:
    """A stream that was written.

    Args:
        path: its file.
        form: which tensors stand in it.
        batches: all that were written, in order.

    Raises:
        CorruptFileError: the file is missing or of another size.
    """

    def __init__(self, path: Path, form: Form, batches: Sequence[Batch]) -> None:
        self.path, self.form = path, form
        self._starts = [batch.start for batch in batches]
        sizes = [len(b.ids) * form.row_numel(b.ids.shape[1]) for b in batches]
        self._offsets = [0, *accumulate(sizes)]
        size = path.stat().st_size if path.is_file() else -1
        if size != 4 * self._offsets[-1]:
            raise CorruptFileError(
                f"{path} is missing or of another size: begin in a new directory"
            )

    def read(self, batch: Batch) -> dict[Key, Tensor]:
        """What stands there for a batch, or for some rows of one."""
        rows, seq = batch.ids.shape
        whole = bisect_right(self._starts, batch.start) - 1
        width = self.form.row_numel(seq)
        first = self._offsets[whole] + (batch.start - self._starts[whole]) // seq * width
        values = np.fromfile(self.path, "<f4", rows * width, offset=4 * first)
        return self.form.from_rows(torch.from_numpy(values).reshape(rows, width), seq)


def write_stream(
    path: Path, form: Form, batches: Sequence[Batch], make: Callable[[Batch], Carried]
) -> tuple[Stream, str]:
    """Write what `make` gives for each batch, one after another.

    Returns:
        The stream, and the hash of the content.

    Raises:
        AnatomyError: tensors of another shape than the form tells.
        WriteError: no space, no permission.
    """
    with atomic(path) as file:
        for batch in batches:
            rows = form.to_rows(make(batch), *batch.ids.shape)
            file.write(np.ascontiguousarray(rows.cpu().numpy(), dtype="<f4").tobytes())
    return Stream(path, form, batches), file.sha256
