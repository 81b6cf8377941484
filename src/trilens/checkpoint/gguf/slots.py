"""One tensor of a GGUF file, and what of the checkpoint it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilens.checkpoint.format.report import TensorReport
from trilens.checkpoint.format.skeleton import Choice
from trilens.checkpoint.gguf.formats import FLOAT_TYPES, ROUNDED_TYPES
from trilens.checkpoint.gguf.recurrent import Change
from trilens.io.safetensors_header import TensorHeader

__all__ = ["GgufSlot", "Piece"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A tensor of the checkpoint, or one matrix of it.

    Attributes:
        choice: The tensor.
        header: Its header.
        expert: The number of the matrix among those stored in one tensor; None for all of it.
    """

    choice: Choice
    header: TensorHeader
    expert: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GgufSlot:
    """One tensor that is to be written.

    Attributes:
        name: In the file.
        pieces: What it is made of: nothing, one tensor, or a matrix for each expert.
        type_id: The number of its type.
        shape: In the file, rows first.
        dtype: In the checkpoint.
        size_bytes: In the file.
        size_bytes_before: In the checkpoint.
        transposed: The checkpoint has columns first.
        order: Which row of the checkpoint each row is; None where none moved.
        offset: What is added to every number.
        change: What becomes of the values before; None for nothing.
        values: What is made; None for a tensor of the checkpoint.
    """

    name: str
    pieces: tuple[Piece, ...]
    type_id: int
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    size_bytes_before: int
    transposed: bool = False
    order: NDArray[np.int64] | None = None
    offset: float = 0.0
    change: Change | None = None
    values: NDArray[np.float32] | None = None

    @property
    def choice(self) -> Choice | None:
        """The tensor of the checkpoint, or the first of several; None for one that is made."""
        return self.pieces[0].choice if self.pieces else None

    @property
    def is_coded(self) -> bool:
        """Whether it is stored as trits."""
        return self.choice is not None and self.choice.storage != "kept"

    @property
    def is_rounded(self) -> bool:
        """Whether it is stored in fewer bits than it has, in blocks."""
        return self.type_id in ROUNDED_TYPES

    def report(self, **measured: Any) -> TensorReport:
        """The outcome of the tensor, as far as headers show, and what was measured."""
        choice = self.choice
        known: dict[str, Any] = {
            "name": self.name if choice is None else choice.name,
            "packed_as": self.name,
            "shape": self.shape,
            "outcome": "planned" if self.is_coded else "rounded" if self.is_rounded else "kept",
            "reason": self._reason(),
            "is_matrix": choice is not None and choice.is_matrix,
            "size_bytes_before": self.size_bytes_before,
            "size_bytes": self.size_bytes,
        }
        return TensorReport(**{**known, **measured})

    def _reason(self) -> str:
        if self.choice is None:
            return "made for the engine"
        notes = [self.choice.reason] if self.choice.reason else []
        if len(self.pieces) > 1:
            notes.append(f"with {len(self.pieces) - 1} others of its kind")
        if self.is_rounded:
            notes.append(f"stored as {ROUNDED_TYPES[self.type_id][0]}")
        elif not self.is_coded and FLOAT_TYPES[self.type_id][0] != self.dtype:
            notes.append(f"stored as {FLOAT_TYPES[self.type_id][0]}")
        if self.change is not None:
            notes.append("computed as the engine wants it")
        if self.offset:
            notes.append(f"with {self.offset:g} added, as the model does")
        return "; ".join(notes)
